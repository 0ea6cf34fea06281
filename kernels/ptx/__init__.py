"""PTX kernels run on the CPU, all threads of a grid in lockstep, with every memory access checked. Needs only numpy."""
