"""Calibration: quantize weights for samples, block by block. Needs torch, except for its options."""
