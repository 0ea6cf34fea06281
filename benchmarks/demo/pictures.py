"""Generated pictures and questions with known answers, for training and evaluating the demo model.

A picture shows one to six things that people know, each in its own cell of a jittered 3 x 3 grid, on a photo-like
background. Held-out pictures of two or more kinds show pairs that training never shows together. All of them go a
little beyond its sizes, angles, light and textures. A split and a seed determine everything; the splits share no random
stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusion_edge.benchmarks.demo.arrangement import (
    BACKGROUNDS,
    GRID,
    PICTURE_SIZE,
    PLACES,
    SPLITS,
    Scene,
    Thing,
    arrange,
)
from fusion_edge.benchmarks.demo.atlas import CATEGORIES
from fusion_edge.benchmarks.demo.atlas import KINDS as THINGS
from fusion_edge.benchmarks.demo.conversations import conversation
from fusion_edge.benchmarks.demo.questions import GENERIC_GUIDES, KINDS, LESSONS, NUMBERS, Question, ask
from fusion_edge.benchmarks.demo.rendering import Pixels, render
from fusion_edge.runtime.errors import UsageError

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "GENERIC_GUIDES",
    "GRID",
    "KINDS",
    "LESSONS",
    "NUMBERS",
    "PICTURE_SIZE",
    "PLACES",
    "SPLITS",
    "THINGS",
    "Example",
    "Pixels",
    "Question",
    "Scene",
    "Thing",
    "arrange",
    "ask",
    "conversation",
    "examples",
    "question_seed",
    "render",
    "scenes",
]


@dataclass(frozen=True)
class Example:
    """Question about an RGB picture ``[384, 384, 3]``."""

    picture: Pixels
    question: str
    answer: str
    kind: str


def examples(split: str, seed: int, questions_per_picture: int = 1) -> Iterator[Example]:
    """Yield examples without end, one per question of each picture.

    Raises :class:`UsageError` if ``split`` is not one of :data:`SPLITS`.
    """
    for number, (scene, picture) in enumerate(scenes(split, seed)):
        for question in ask(scene, np.random.default_rng(question_seed(split, seed, number)), questions_per_picture):
            yield Example(picture, question.text, question.answer, question.kind)


def question_seed(split: str, seed: int, number: int) -> list[int]:
    """Return the seed of the questions about picture ``number`` of a split and seed."""
    return [SPLITS.index(split), seed, number]


def scenes(split: str, seed: int) -> Iterator[tuple[Scene, Pixels]]:
    """Yield scenes and pictures without end. Raises :class:`UsageError` as :func:`examples` does."""
    if split not in SPLITS:
        raise UsageError(f"The split {split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    while True:
        scene = arrange(rng, split)
        yield scene, render(scene, rng, split)
