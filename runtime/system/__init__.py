"""The process and its machine: signals, memory, processors, threads, progress, atomic output files."""
