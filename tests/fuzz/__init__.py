"""A fuzz campaign: seeded, structure-aware mutants of all that fusion-edge reads. ``python -m tests.fuzz --help``."""
