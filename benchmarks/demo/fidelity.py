"""Compare a bundle's logits with exact arithmetic on the same dequantized weights.

    python -m fusion_edge.benchmarks.demo.fidelity --bundle FOLDER --questions 200

Accuracy level 4 quantizes the activations of every GEMM to int8. This isolates its effect on held-out questions from
that of quantized weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.demo.evaluate import held_out
from fusion_edge.benchmarks.demo.pictures import Example
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime import load
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.requests import ImageLike
from fusion_edge.runtime.sampling import Sampling


@dataclass(frozen=True)
class Fidelity:
    """Agreement of the logits after each prompt."""

    cosines: npt.NDArray[np.float64]
    same_token: npt.NDArray[np.bool_]

    def __str__(self) -> str:
        return (
            f"{len(self.cosines)} prompts: mean cosine {self.cosines.mean():.5f}, smallest {self.cosines.min():.5f}; "
            f"same most likely token for {self.same_token.mean():.1%}"
        )


def first_logits(fusion: Fusion, image: ImageLike, question: str, history: Sequence[Turn] = ()) -> Floats:
    """Return the backend's float32 logits ``[V]`` after the prompt."""
    logits: list[Floats] = []
    prefill = fusion.backend.prefill

    def watch(*inputs: Any) -> Floats:
        logits.append(prefill(*inputs).copy())
        return logits[-1]

    fusion.backend.prefill = watch  # type: ignore[assignment]
    try:
        fusion.answer(image, question, history=history, sampling=Sampling(max_new_tokens=1))
    finally:
        fusion.backend.prefill = prefill  # type: ignore[method-assign]
    return logits[0]


def compare(folder: Path, asked: Iterable[Example]) -> Fidelity:
    """Compare a bundle with the eager interpreter on its dequantized weights, at the default query length."""
    bundle = open_bundle(folder)
    cosines, same = [], []
    with load(folder) as fusion:
        eager = EagerBackend(fusion.config, BundleWeights(bundle))
        reference = Fusion(bundle.manifest, eager, fusion.tokenizer, eager.embed)
        for example in asked:
            a, b = (
                first_logits(model, example.picture, example.question).astype(np.float64)
                for model in (fusion, reference)
            )
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            same.append(a.argmax() == b.argmax())
    return Fidelity(np.array(cosines), np.array(same))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, required=True, help="bundle folder of the demo model")
    parser.add_argument(
        "--questions", type=positive_integer, default=200, help="number of questions (default: %(default)s)"
    )
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    sys.stdout.write(f"{compare(options.bundle, held_out(options.questions))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
