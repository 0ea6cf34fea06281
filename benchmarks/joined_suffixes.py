"""Measure what joining the questions of a scene in one prefill could save at most.

    python -m fusion_edge.benchmarks.joined_suffixes --bundle BUNDLE --json FILE

Behind a common prefix, a run over the rows of N questions is compared with N runs over the rows of one. The graph
cannot compute the joined run for different questions: their rows would attend to each other, and it returns the logits
of one row. The run over as many rows is the least that it would take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.backends.base import Floats, ImageAlignment
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.images.grids import alignment_cells
from fusion_edge.runtime.system.output_file import write_whole

QUESTION = 26
"""Rows of a question, its template and header."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle folder")
    add("--questions", type=positive_integer, default=2, help="questions of the joined run (default: %(default)s)")
    add("--query-length", type=positive_integer, metavar="N", help="latents (default: the first that is offered)")
    add("--rounds", type=positive_integer, default=3, help="rounds of both ways (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    with load(options.bundle, device="cpu") as fusion:
        result = measure(fusion, options.questions, options.rounds, options.query_length)
    sys.stdout.write(
        f"{result['latents']} latents: {options.questions} questions take {result['separate_seconds']:.2f} s one after "
        f"another, {result['joined_seconds']:.2f} s joined: {result['joined_over_separate']:.2f} x\n"
    )
    if options.json:
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    return 0


def measure(fusion: Fusion, questions: int, rounds: int, query_length: int | None = None) -> dict[str, Any]:
    """Time both ways in turns, with random rows."""
    image = _image(fusion, fusion.query_length(query_length))
    prefix_rows, latents = fusion.manifest.image_side**2 + 20, len(image.latents)
    prefix = fusion.backend.prefill_prefix(_rows(fusion, prefix_rows))

    def seconds(count: int) -> float:
        """Run the rows of ``count`` questions."""
        length = latents + QUESTION
        rows = _rows(fusion, count * length)
        starts = length * np.arange(count)
        places = starts[:, None] + np.arange(latents), starts + length - 1
        started = time.perf_counter()
        fusion.backend.prefill(rows, image, *places, prefix_rows + len(rows), prefix)
        return time.perf_counter() - started

    seconds(1)  # warm up
    separate, joined = [], []
    for _ in range(rounds):
        separate.append(sum(seconds(1) for _ in range(questions)))
        joined.append(seconds(questions))
    return {
        "questions": questions,
        "latents": latents,
        "prefix_rows": prefix_rows,
        "separate_seconds": statistics.median(separate),
        "joined_seconds": statistics.median(joined),
        "joined_over_separate": statistics.median(b / a for a, b in zip(separate, joined, strict=True)),
        "rounds": rounds,
        "processor": machine_info(None).processor,
    }


def _rows(fusion: Fusion, count: int) -> Floats:
    width = fusion.config.language.hidden_size
    return np.random.default_rng(0).normal(0, 0.02, (count, width)).astype(np.float32)


def _image(fusion: Fusion, query_length: int) -> ImageAlignment:
    """Return the alignment of random features."""
    config = fusion.config
    shape = (GLOBAL_CROPS, config.vision.patches, config.language.hidden_size)
    features = np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)
    cells = alignment_cells(2 * config.vision.grid, query_length, config.alignment.window_size)
    return fusion.backend.align(features, *cells)


if __name__ == "__main__":
    sys.exit(main())
