"""Write calibration samples of the demo task for ``fusion-export --calibrate``: pictures, and a JSONL file.

python -m fusion_edge.benchmarks.demo.samples --output FOLDER --count 144
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from PIL import Image

from fusion_edge.benchmarks.demo.pictures import examples
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.system.output_file import write_whole

SPLIT, SEED = "train", 1  # disjoint from the evaluation


def write_samples(folder: Path, count: int) -> None:
    """Write ``samples.jsonl`` and one picture per line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, example in enumerate(itertools.islice(examples(SPLIT, SEED, 1), count)):
        name = f"{number:05}.png"
        Image.fromarray(example.picture).save(folder / name)
        lines.append(json.dumps({"image": name, "question": example.question, "answer": example.answer}))
    write_whole(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=positive_integer, default=144, help="number of samples (default: %(default)s)")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    write_samples(options.output, options.count)
    sys.stdout.write(f"{options.output}: {options.count} samples\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
