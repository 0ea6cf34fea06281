"""A fuzz campaign: seeded, structure-aware mutants of every input. See ``python -m tests.fuzz --help``."""
