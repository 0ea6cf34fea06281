"""Evaluate the demo model on held-out questions: a checkpoint in the eager interpreter, or a bundle.

python -m fusion_edge.benchmarks.demo.evaluate --checkpoint FOLDER --questions 1000
python -m fusion_edge.benchmarks.demo.evaluate --bundle FOLDER --questions 1000
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fusion_edge.benchmarks.demo.pictures import KINDS, Example, Pixels, examples
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.runtime import Fusion, Sampling, load
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.errors import UsageError

SEED = 0
"""Seed of the held-out pictures; training validates with another one."""
QUESTIONS_PER_PICTURE = 5
MAX_NEW_TOKENS = 32

Answerer = Callable[[Pixels, str], str]
"""Maps an RGB picture and a question to an answer."""


@dataclass(frozen=True)
class Score:
    """Number of exact answers by kind of question."""

    asked: Mapping[str, int]
    exact: Mapping[str, int]

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return sum(self.exact.values()) / sum(self.asked.values())

    def __str__(self) -> str:
        kinds = [f"{kind} {self.exact.get(kind, 0) / self.asked[kind]:.1%}" for kind in KINDS if kind in self.asked]
        total = f"{sum(self.exact.values())} of {sum(self.asked.values())} answers exact"
        return f"{total}: {self.accuracy:.1%} ({', '.join(kinds)})"


def held_out(questions: int) -> Iterable[Example]:
    """Return the first held-out questions, five per picture."""
    return itertools.islice(examples("held_out", SEED, QUESTIONS_PER_PICTURE), questions)


def evaluate(answer: Answerer, asked: Iterable[Example]) -> Score:
    """Ask every question; only exact answers count."""
    counts: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    for example in asked:
        counts[example.kind] += 1
        exact[example.kind] += answer(example.picture, example.question) == example.answer
    return Score(counts, exact)


class WithoutAlignment(EagerBackend):
    """Eager interpreter without interaction layers."""

    def hidden(self, embeddings: Floats, alignment: Alignment[Tensor] | None) -> Tensor:
        return super().hidden(embeddings, None)


def answerer(fusion: Fusion, query_length: int | None = None) -> Answerer:
    """Return a function that answers greedily, by default with the fewest latents that the model offers."""
    length = min(fusion.manifest.query_lengths) if query_length is None else query_length
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    return lambda picture, question: fusion.answer(picture, question, query_length=length, sampling=sampling).text


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="FUSION checkpoint folder")
    source.add_argument("--bundle", type=Path, help="bundle folder")
    parser.add_argument(
        "--questions", type=positive_integer, default=1000, help="number of questions (default: %(default)s)"
    )
    parser.add_argument(
        "--query-length", type=positive_integer, help="latents (default: the fewest that the model offers)"
    )
    parser.add_argument(
        "--without-alignment", action="store_true", help="disable the interaction layers of a checkpoint"
    )
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    if options.bundle is not None and options.without_alignment:
        raise UsageError("--without-alignment needs --checkpoint; bundles always have interaction layers.")
    backend = WithoutAlignment if options.without_alignment else EagerBackend
    source = load(options.bundle) if options.bundle is not None else open_checkpoint(options.checkpoint, backend)
    with source as fusion:
        score = evaluate(answerer(fusion, options.query_length), held_out(options.questions))
    sys.stdout.write(f"{score}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
