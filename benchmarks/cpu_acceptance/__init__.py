"""Everything that the CPU kernels are held to, measured on this machine in one run."""
