"""Entry point of the command: see ``runtime/cli/entry.py``."""

from __future__ import annotations

from fusion_edge.runtime.cli.entry import start


def bench() -> int:
    """``fusion-bench``; the exit code."""
    return start("fusion_edge.benchmarks.latency.cli")
