"""Measurements of fusion-serve."""
