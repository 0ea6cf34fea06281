"""Measure a bundle's stages on each tier of the CPU kernels that this processor has.

    python -m fusion_edge.benchmarks.cpu_tiers BUNDLE --json FILE

The tiers take turns in every round, so that other load of the machine slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.rounds import rounds_parser, write_result
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.sampling import Sampling
from fusion_edge.runtime.system.progress import Progress

QUESTIONS = ("Is the path clear?", "How many people do you see?")
GUIDE = "Is the path in front of the robot clear, and what is on it?"
Times = dict[str, list[float]]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(_main, rounds_parser(__doc__, 3).parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    machine = machine_info(None)
    if cpu_kernels.library() is None or not (names := cpu_kernels.tiers()):
        raise FusionError(
            f"The CPU kernels are not compiled, or this is not {cpu_kernels.processor_needed()}; see fusion-info."
        )
    times: dict[str, Times] = {name: defaultdict(list) for name in names}
    with load(options.bundle, device="cpu") as fusion:
        if reason := cpu_kernels.unsupported_reason(fusion.manifest):
            raise FusionError(f"The CPU kernels cannot run {options.bundle}. {reason}")
        for name in names:
            cpu_kernels.use_tier(name)
            measure(fusion, 0, defaultdict(list))  # reads the weights, allocates scratch memory
        with Progress("Measuring", options.rounds * len(names), None) as progress:
            for number in range(options.rounds):
                for name in names:
                    cpu_kernels.use_tier(name)
                    measure(fusion, number, times[name])
                    progress.advance(1)
    sys.stdout.write(table(times))
    if options.json:
        write_result(options.json, "cpu_tiers BUNDLE", options.rounds, machine, {"seconds": times})
    return 0


def measure(fusion: Fusion, seed: int, times: Times) -> None:
    """Append the seconds of the stages of two questions about a picture, and of one behind a scene."""
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (480, 640, 3), np.uint8))
    sampling = Sampling(max_new_tokens=1)
    fusion.clear_image_cache()
    first, second = (fusion.answer(picture, question, sampling=sampling).timings_ms for question in QUESTIONS)
    with fusion.look(picture, GUIDE) as scene:
        behind = scene.answer(QUESTIONS[1], sampling=sampling).timings_ms
    for stage in ("vision", "alignment", "prefill"):
        times[stage].append(first[stage] / 1e3)
    times["first token"].append(_first_token(first))
    times["exact follow-up"].append(_first_token(second))
    times["behind a scene"].append(_first_token(behind))


def _first_token(timings: dict[str, float]) -> float:
    return sum(timings[stage] for stage in ("preprocess", "vision", "alignment", "prefill")) / 1e3


def table(times: dict[str, Times]) -> str:
    """Format the medians, and how many times as fast the last tier is as the first."""
    names = list(times)
    rows: list[tuple[str, ...]] = [("stage", *names, "speedup")]
    for stage in times[names[0]]:
        medians = [statistics.median(times[name][stage]) for name in names]
        rows.append((stage, *(f"{value:.3f} s" for value in medians), f"{medians[0] / medians[-1]:.2f}"))
    return format_table(rows)


if __name__ == "__main__":
    sys.exit(main())
