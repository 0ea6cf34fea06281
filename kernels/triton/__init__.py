"""The recursive alignment's kernels in Triton, and their ahead-of-time compilation."""
