"""The process and its machine: signals, memory, processors, progress, files that are written whole."""
