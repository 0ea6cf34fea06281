"""Where the tests' data lie."""

from pathlib import Path

TESTS = Path(__file__).parent
GOLDEN = TESTS / "data" / "golden"
"""Small checkpoints and outputs of the released code."""
DEMO_CHECKPOINT = TESTS.parent / "benchmarks" / "demo" / "checkpoint"
