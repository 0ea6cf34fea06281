"""Evaluate a checkpoint without its interaction layers. Takes the options of ``fusion-eval``.

python -m fusion_edge.benchmarks.demo.without_alignment CHECKPOINT SAMPLES.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fusion_edge.benchmarks.evaluation import cli
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.runtime.backends.base import Floats


class WithoutAlignment(EagerBackend):
    """Eager interpreter without interaction layers."""

    def hidden(self, embeddings: Floats, alignment: Alignment[Tensor] | None) -> Tensor:
        return super().hidden(embeddings, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run("without_alignment", arguments, _models)


def _models(options: argparse.Namespace) -> cli.Models:
    return lambda: open_checkpoint(Path(options.bundle), WithoutAlignment), None


if __name__ == "__main__":
    sys.exit(main())
