"""Measure how well the demo model's probabilities are calibrated, on clear and on degraded held-out pictures.

    python -m fusion_edge.benchmarks.demo.reliability --questions 1000 --json FILE

Every question is asked twice: ``Fusion.choose`` among the plausible answers to its kind of question, and
``Fusion.answer``, whose confidence is that of its tokens. ``benchmarks.demo.reliability_plot`` draws the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.demo import CHECKPOINT
from fusion_edge.benchmarks.demo.pictures import (
    BACKGROUNDS,
    CATEGORIES,
    KINDS,
    NUMBERS,
    THINGS,
    Example,
    Pixels,
    examples,
)
from fusion_edge.benchmarks.evaluation.calibration_error import expected_calibration_error, reliability
from fusion_edge.export import cli
from fusion_edge.runtime import Fusion, Sampling, load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.output_file import write_whole

SEED = 0
QUESTIONS_PER_PICTURE = 5
QUERY_LENGTH = 16
DEGRADED_SIZE = 42  # pixels
SAMPLING = Sampling(max_new_tokens=16)
"""Every right answer is shorter."""
CHOICES = {
    "count": NUMBERS,
    "presence": ("yes", "no"),
    "category": tuple(CATEGORIES),
    "background": BACKGROUNDS,
}
"""All plausible answers, by kind of question. Those to other kinds are things."""
THING_CHOICES = 8
"""Choices of things: the right one, others of its category, and as many of other categories."""
FORMATS = {"fp32": "--fp32", "int4": "--int4"}
"""Options of ``fusion-export`` by name in the result."""


def candidates(kind: str, answer: str, number: int) -> tuple[str, ...]:
    """Return plausible answers to question ``number``, the right one among them, in an order without a meaning."""
    if kind in CHOICES:
        return CHOICES[kind]
    rng = random.Random(number)
    others = [name for name in THINGS if name != answer]
    rng.shuffle(others)
    near = [name for name in others if THINGS[name].category == THINGS[answer].category][: THING_CHOICES // 2 - 1]
    far = [name for name in others if THINGS[name].category != THINGS[answer].category]
    chosen = [answer]
    for name in [*near, *far]:  # choose refuses the start of another choice, such as car beside carrot
        if len(chosen) < THING_CHOICES and not any(name.startswith(one) or one.startswith(name) for one in chosen):
            chosen.append(name)
    return tuple(rng.sample(chosen, len(chosen)))


@dataclass(frozen=True)
class Asked:
    """What the model said to one question."""

    kind: str
    probability: float
    """Of the likeliest choice."""
    is_right: bool
    """Whether that choice is the answer."""
    mass: float
    """Probability that the answer begins with any of the choices."""
    confidence: float
    """Of the free answer."""
    is_exact: bool
    """Whether the free answer is exact."""


def degraded(picture: Pixels, number: int) -> Pixels:
    """Return a dark, blurred and noisy picture ``[384, 384, 3]``, as of a camera at night; the model saw none such."""
    rng = np.random.default_rng([SEED, number])
    small = Image.fromarray(picture).resize((DEGRADED_SIZE, DEGRADED_SIZE), Image.Resampling.BOX)
    blurred = np.asarray(small.resize((picture.shape[1], picture.shape[0]), Image.Resampling.BICUBIC), np.float32)
    noisy = 0.45 * blurred + rng.normal(0, 10, picture.shape)
    pixels: Pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    return pixels


def ask(fusion: Fusion, asked: Iterable[Example]) -> Iterator[Asked]:
    """Ask every question in both ways."""
    for number, example in enumerate(asked):
        choices = candidates(example.kind, example.answer, number)
        choice = fusion.choose(example.picture, example.question, choices, query_length=QUERY_LENGTH)
        answer = fusion.answer(example.picture, example.question, query_length=QUERY_LENGTH, sampling=SAMPLING)
        yield Asked(
            kind=example.kind,
            probability=choice.probabilities[choice.text],
            is_right=choice.text == example.answer,
            mass=float(np.exp(list(choice.logprobs.values())).sum()),
            confidence=answer.confidence,
            is_exact=answer.text == example.answer,
        )


def summary(asked: list[Asked]) -> dict[str, Any]:
    """Return accuracies, calibration errors and the bins of choices."""
    probabilities, are_right = [one.probability for one in asked], [one.is_right for one in asked]
    by_kind = {
        kind: float(np.mean([one.is_right for one in asked if one.kind == kind]))
        for kind in KINDS
        if any(one.kind == kind for one in asked)
    }
    return {
        "choice_accuracy": float(np.mean(are_right)),
        "choice_calibration_error": expected_calibration_error(probabilities, are_right),
        "choice_accuracy_by_kind": by_kind,
        "mass_of_choices": float(np.mean([one.mass for one in asked])),
        "bins": [asdict(bin) for bin in reliability(probabilities, are_right)],
        "answer_accuracy": float(np.mean([one.is_exact for one in asked])),
        "answer_calibration_error": expected_calibration_error(
            [one.confidence for one in asked], [one.is_exact for one in asked]
        ),
    }


def held_out(questions: int, pictures: str) -> Iterator[Example]:
    """Return the first held-out questions, about ``clear`` or ``degraded`` pictures."""
    asked = itertools.islice(examples("held_out", SEED, QUESTIONS_PER_PICTURE), questions)
    for number, example in enumerate(asked):
        picture = example.picture
        if pictures == "degraded":
            picture = degraded(picture, number // QUESTIONS_PER_PICTURE)
        yield Example(picture, example.question, example.answer, example.kind)


def measure(checkpoint: Path, questions: int) -> dict[str, Any]:
    """Export the checkpoint in each format and ask all questions."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, option in FORMATS.items():
            bundle = Path(work) / name
            if cli.main([str(checkpoint), "-o", str(bundle), option]) != 0:
                raise FusionError(f"Export of {bundle} failed; see its error above.")
            with load(bundle, threads=1) as fusion:
                for pictures in ("clear", "degraded"):
                    asked = list(ask(fusion, held_out(questions, pictures)))
                    rows.append({"format": name, "pictures": pictures, **summary(asked)})
    return {"questions": questions, "query_length": QUERY_LENGTH, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = ["| pictures | format | accuracy, choose | calibration error | accuracy, answer | calibration error |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["rows"]:
        figures = [
            row[f"{way}_{figure}"] for way in ("choice", "answer") for figure in ("accuracy", "calibration_error")
        ]
        cells = [row["pictures"], row["format"], *(f"{figure:.1%}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="what demo.train wrote (default: the committed one)")
    add("--questions", type=positive_integer, default=1000, help="number of questions (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    result = measure(options.checkpoint, options.questions)
    if options.json:
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
