"""Measure the demo model on held-out questions: a checkpoint through the eager interpreter, or a bundle.

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
"""Of the held-out split; training validates on another one."""
QUESTIONS_A_PICTURE = 5
MAX_NEW_TOKENS = 32

Answerer = Callable[[Pixels, str], str]
"""From an RGB picture and a question to the answer's text."""


@dataclass(frozen=True)
class Score:
    """Exact answers, overall and by kind of question."""

    asked: Mapping[str, int]
    right: Mapping[str, int]

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return sum(self.right.values()) / sum(self.asked.values())

    def __str__(self) -> str:
        kinds = [f"{kind} {self.right.get(kind, 0) / self.asked[kind]:.1%}" for kind in KINDS if kind in self.asked]
        total = f"{sum(self.right.values())} of {sum(self.asked.values())} answers exact"
        return f"{total}: {self.accuracy:.1%} ({', '.join(kinds)})"


def held_out(questions: int) -> Iterable[Example]:
    """The first held-out questions, five about each picture."""
    return itertools.islice(examples("held_out", SEED, QUESTIONS_A_PICTURE), questions)


def evaluate(answer: Answerer, asked: Iterable[Example]) -> Score:
    """Ask everything; an answer counts only if it is the right one to the letter."""
    counts: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for example in asked:
        counts[example.kind] += 1
        right[example.kind] += answer(example.picture, example.question) == example.answer
    return Score(counts, right)


class WithoutAlignment(EagerBackend):
    """The eager interpreter, its interaction layers switched off."""

    def hidden(self, embeddings: Floats, alignment: Alignment[Tensor] | None) -> Tensor:
        return super().hidden(embeddings, None)


def answerer(fusion: Fusion, query_length: int | None = None) -> Answerer:
    """Greedy answers of a loaded model, with the fewest latents that it offers unless told."""
    length = min(fusion.manifest.query_lengths) if query_length is None else query_length
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    return lambda picture, question: fusion.answer(picture, question, query_length=length, sampling=sampling).text


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder of a FUSION checkpoint")
    source.add_argument("--bundle", type=Path, help="folder of an exported bundle")
    parser.add_argument("--questions", type=positive_integer, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--query-length", type=positive_integer, help="latents (default: the fewest offered)")
    parser.add_argument("--without-alignment", action="store_true", help="switch a checkpoint's interaction layers off")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    if options.bundle is not None and options.without_alignment:
        raise UsageError("--without-alignment needs --checkpoint: a bundle's graphs always align.")
    backend = WithoutAlignment if options.without_alignment else EagerBackend
    source = load(options.bundle) if options.bundle is not None else open_checkpoint(options.checkpoint, backend)
    with source as fusion:
        score = evaluate(answerer(fusion, options.query_length), held_out(options.questions))
    sys.stdout.write(f"{score}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
