"""Fits quantized weights to samples, block by block. Needs torch."""
