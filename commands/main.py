"""What ``fusion-*`` start: signals are taken first, for imports take as long as a user takes to press Ctrl-C."""

from __future__ import annotations

import sys
from importlib import import_module

from fusion_edge.commands import limits, signals


def export() -> int:
    """``fusion-export``; the exit code."""
    return _run("fusion_edge.export.cli")


def run() -> int:
    """``fusion-run``; the exit code."""
    return _run("fusion_edge.runtime.cli_run")


def info() -> int:
    """``fusion-info``; the exit code."""
    return _run("fusion_edge.runtime.cli_info")


def build() -> int:
    """``fusion-build``; the exit code."""
    return _run("fusion_edge.export.cli_build")


def bench() -> int:
    """``fusion-bench``; the exit code."""
    return _run("fusion_edge.benchmarks.latency.cli")


def _run(module: str) -> int:
    signals.leave_at_once()
    if reason := limits.too_little():
        sys.stderr.write(f"error: {reason}\n")
        return 1
    command = import_module(module)
    try:
        code: int = command.main()
    except SystemExit as ended:  # by argparse, after --help or a wrong option; what it wrote may not go out
        from argparse import Namespace

        from fusion_edge.runtime import cli

        asked = ended.code if isinstance(ended.code, int) else 0
        return cli.run(lambda _: asked, Namespace())
    return code
