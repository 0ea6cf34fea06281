"""Where the tests' data lie."""

from pathlib import Path

_TESTS = Path(__file__).parent
GOLDEN = _TESTS / "data" / "golden"
"""Small checkpoints and outputs of the released code."""
DEMO_CHECKPOINT = _TESTS.parent / "benchmarks" / "demo" / "checkpoint"
