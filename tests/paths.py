"""Where the tests' data lie."""

from pathlib import Path

_TESTS = Path(__file__).parent
DATA = _TESTS / "data"
GOLDEN = DATA / "golden"
"""Small checkpoints and outputs of the released code."""
DEMO_CHECKPOINT = _TESTS.parent / "benchmarks" / "demo" / "checkpoint"
QUANTIZED = DATA / "quantized"
"""Linears in the layouts of quantized checkpoints, written by ``data/make_quantized_fixtures.py``."""
