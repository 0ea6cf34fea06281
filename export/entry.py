"""Entry points of the commands: see ``runtime/cli/entry.py``."""

from __future__ import annotations

from fusion_edge.runtime.cli.entry import start

LIBRARIES = ("onnx", "huggingface_hub")


def export() -> int:
    """``fusion-export``; the exit code."""
    return start("fusion_edge.export.cli", LIBRARIES, extra="export")


def build() -> int:
    """``fusion-build``; the exit code."""
    return start("fusion_edge.export.engines.cli", LIBRARIES, extra="export")
