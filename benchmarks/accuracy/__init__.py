"""Accuracy of models: of quantized ones, and of their probabilities."""
