"""Builds TensorRT engines from a bundle's graphs."""
