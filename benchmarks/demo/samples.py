"""Write samples of the demo task: pictures, and a JSONL file of questions with answers.

    python -m fusion_edge.benchmarks.demo.samples --output FOLDER --count 144
    python -m fusion_edge.benchmarks.demo.samples --output FOLDER --count 1000 --held-out

Those of training are for ``fusion-export --calibrate``, held-out ones for ``fusion-eval``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from fusion_edge.benchmarks.demo.pictures import examples
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.system.output_file import write_whole

SAMPLES = "samples.jsonl"
TRAINING = ("train", 1, 1)
HELD_OUT = ("held_out", 0, 5)
"""Split, seed and questions a picture. Training itself uses other seeds."""


def write_samples(folder: Path, count: int, held_out: bool = False) -> float:
    """Write :data:`SAMPLES` and its pictures.

    Returns the share of samples that the most frequent answer of each kind of question answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, asked = [], []
    split, seed, questions = HELD_OUT if held_out else TRAINING
    for number, example in enumerate(itertools.islice(examples(split, seed, questions), count)):
        name = f"{number // questions:05}.png"
        if number % questions == 0:
            Image.fromarray(example.picture).save(folder / name)
        lines.append(json.dumps({"image": name, "question": example.question, "answer": example.answer}))
        asked.append((example.kind, example.answer))
    write_whole(folder / SAMPLES, "".join(f"{line}\n" for line in lines))
    return most_frequent_share(asked)


def most_frequent_share(asked: Collection[tuple[str, str]]) -> float:
    """Return the share of questions (kind, answer) that the most frequent answer of each kind answers."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer in asked:
        answers[kind][answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(asked)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=positive_integer, default=144, help="number of samples (default: %(default)s)")
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="write samples that are not of training, five questions a picture (default: of training, one a picture)",
    )
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    guessed = write_samples(options.output, options.count, options.held_out)
    sys.stdout.write(f"{options.output / SAMPLES}: {options.count} samples\n")
    sys.stdout.write(f"The most frequent answer of each kind of question is right for {guessed:.1%}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
