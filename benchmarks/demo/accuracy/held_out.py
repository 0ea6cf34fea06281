"""Held-out pictures in a folder, each with questions and with a conversation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.demo.pictures import Question, ask, conversation, question_seed, scenes
from fusion_edge.benchmarks.demo.samples import HELD_OUT
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.system.output_file import write_whole

SPLIT, SEED, QUESTIONS_PER_PICTURE = HELD_OUT
TURNS = 4
"""Questions of a conversation."""
FILE = "pictures.json"


@dataclass(frozen=True)
class Picture:
    """A picture, and what is asked about it."""

    image: str
    """Name of its file."""
    questions: tuple[Question, ...]
    conversation: tuple[Question, ...]


@dataclass(frozen=True)
class _Content:
    pictures: tuple[Picture, ...]


def write_pictures(folder: Path, count: int) -> None:
    """Write ``count`` pictures. Their questions are those of ``benchmarks.demo.samples --held-out``."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, (scene, pixels) in enumerate(itertools.islice(scenes(SPLIT, SEED), count)):
        key = question_seed(SPLIT, SEED, number)
        name = f"{number:05}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)  # fast
        questions = ask(scene, np.random.default_rng(key), QUESTIONS_PER_PICTURE)
        turns = conversation(scene, np.random.default_rng([*key, TURNS]), TURNS)
        pictures.append(Picture(name, tuple(questions), tuple(turns)))
    write_whole(folder / FILE, json.dumps(asdict(_Content(tuple(pictures)))))  # last: complete


def read_pictures(folder: Path) -> tuple[Picture, ...]:
    """Return the pictures of a folder that :func:`write_pictures` wrote."""
    return from_json(_Content, read_json(folder / FILE)).pictures


@dataclass(frozen=True)
class Asked:
    """A question as it is counted."""

    picture: int
    """Number of its picture."""
    turn: int
    """Place in its conversation, from 0; 0 for a question on its own."""
    question: Question


def asked_questions(pictures: Sequence[Picture], is_conversation: bool) -> list[Asked]:
    """Return all questions in the order in which they are asked."""
    return [
        Asked(number, turn if is_conversation else 0, question)
        for number, picture in enumerate(pictures)
        for turn, question in enumerate(picture.conversation if is_conversation else picture.questions)
    ]
