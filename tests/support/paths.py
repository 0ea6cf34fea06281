"""Folders of the tests and their data."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
"""The checkout."""
DATA = TESTS / "data"
GOLDEN = DATA / "golden"
"""Small checkpoints and outputs of the released code."""
DEMO_CHECKPOINT = ROOT / "benchmarks" / "demo" / "checkpoint"
QUANTIZED = DATA / "quantized"
"""Linears in the layouts of quantized checkpoints, written by ``data/make_quantized_fixtures.py``."""
