"""Compare a bundle with exact arithmetic on the same dequantized weights. Takes the options of ``fusion-eval``.

    python -m fusion_edge.benchmarks.demo.exact_arithmetic BUNDLE SAMPLES.jsonl

This separates the effect of quantized activations and of kernels from that of quantized weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion_edge.benchmarks.evaluation import cli
from fusion_edge.benchmarks.evaluation.models import open_model
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime import Fusion
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli.model_options import load_options
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.tokenization.tokenizer import load_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run("python -m fusion_edge.benchmarks.demo.exact_arithmetic", arguments, _models)


def _models(options: argparse.Namespace) -> cli.Models:
    for option in ("reference", "revision"):
        if getattr(options, option) is not None:
            raise UsageError(
                f"--{option} is not for this comparison: the reference is the bundle's own weights. Leave it out."
            )

    def reference() -> Fusion:
        bundle = open_bundle(options.bundle)
        eager = EagerBackend(bundle.manifest.model, BundleWeights(bundle))
        return Fusion(bundle.manifest, eager, load_tokenizer(bundle), eager.embed)

    return lambda: open_model(Path(options.bundle), **load_options(options)), reference


if __name__ == "__main__":
    sys.exit(main())
