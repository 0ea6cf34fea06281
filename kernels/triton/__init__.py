"""Triton kernels of the recursive alignment, and their ahead-of-time compilation to PTX."""
