"""Accuracy of quantized models."""
