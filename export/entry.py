"""Entry points of the exporter's commands (see ``runtime/cli/entry.py``)."""

from __future__ import annotations

from fusion_edge.runtime.cli.entry import start

LIBRARIES = ("onnx", "huggingface_hub")


def export() -> int:
    """Run ``fusion-export``. Returns the exit code."""
    return start("fusion_edge.export.cli", LIBRARIES, extra="export")


def build() -> int:
    """Run ``fusion-build``. Returns the exit code."""
    return start("fusion_edge.export.engines.cli", LIBRARIES, extra="export")
