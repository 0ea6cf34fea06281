"""Entry points of ``fusion-bench`` and ``fusion-eval``; see ``runtime/cli/entry.py``."""

from __future__ import annotations

from fusion_edge.runtime.cli.entry import start


def bench() -> int:
    """Run ``fusion-bench`` and return its exit code."""
    return start("fusion_edge.benchmarks.latency.cli")


def evaluate() -> int:
    """Run ``fusion-eval`` and return its exit code."""
    return start("fusion_edge.benchmarks.evaluation.cli")
