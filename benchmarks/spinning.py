"""Measure what spinning threads of ONNX Runtime win and cost, beside a busy program and without one.

    python -m fusion_edge.benchmarks.spinning BUNDLE --questions 2 --json FILE

Two models, with ``spin`` and without, take turns in every round: decode steps, then questions about a new image. The
busy program keeps one processor. Minima are those of a quiet machine even if other work disturbs it at times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.decode_overhead import prefill
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.latency.peaks import QUIET
from fusion_edge.benchmarks.rounds import Times, percentile_table, percentiles, rounds_parser, write_result
from fusion_edge.runtime import Fusion, Sampling, load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.system.progress import Progress

PROMPT = 64  # tokens
BUSY = "import os; os.sched_setaffinity(0, {%d})\nwhile True: pass"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = rounds_parser(__doc__, 20)
    parser.add_argument(
        "--steps", type=positive_integer, default=20, help="decode steps a round (default: %(default)s)"
    )
    parser.add_argument(
        "--questions", type=int, default=0, metavar="N", help="questions a round (default: %(default)s)"
    )
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    machine = machine_info(None)
    times: dict[str, Times] = defaultdict(lambda: defaultdict(list))
    with (
        load(options.bundle, device="cpu", spin=True) as spinning,
        load(options.bundle, device="cpu") as sleeping,
        Progress("Measuring", options.rounds * 4, None) as progress,
    ):
        models = {"spin": spinning, "sleep": sleeping}
        for number in range(options.rounds + 1):
            for place in ("quiet", "busy"):
                with busy_processor() if place == "busy" else nullcontext():
                    for name, fusion in models.items():
                        time.sleep(QUIET)
                        found = measure(fusion, options.steps, options.questions, number)
                        if number > 0:  # the first round reads the weights
                            for part, seconds in found.items():
                                times[f"{place}, {name}"][part] += seconds
                            progress.advance(1)
    sys.stdout.write(percentile_table(times))
    if options.json:
        given = f"spinning BUNDLE --steps {options.steps} --questions {options.questions}"
        write_result(options.json, given, options.rounds, machine, {"seconds": percentiles(times)})
    return 0


@contextmanager
def busy_processor() -> Iterator[None]:
    """Keep the last processor of this process busy with another process."""
    program = subprocess.Popen([sys.executable, "-c", BUSY % max(os.sched_getaffinity(0))])
    try:
        yield
    finally:
        program.kill()
        program.wait()


def measure(fusion: Fusion, steps: int, questions: int, seed: int) -> Times:
    """Return the seconds of decode steps, of questions about new images, and of their preprocessing."""
    times: Times = {"decode step": decode_steps(fusion, steps), "question": [], "preprocessing": []}
    noise = np.random.default_rng(seed)
    for _ in range(questions):
        picture = Image.fromarray(noise.integers(0, 256, (480, 640, 3), np.uint8))
        started = time.perf_counter()
        answer = fusion.answer(picture, "Is the path clear?", sampling=Sampling(max_new_tokens=4))
        times["question"].append(time.perf_counter() - started)
        times["preprocessing"].append(answer.timings_ms["preprocess"] / 1e3)
    return {part: seconds for part, seconds in times.items() if seconds}


def decode_steps(fusion: Fusion, count: int) -> list[float]:
    """Return the seconds of ``count`` decode steps behind a prompt of random embeddings."""
    prefill(fusion, PROMPT, PROMPT + 1 + count)
    row = fusion.embed(np.array([0]))[0]
    fusion.backend.decode(row)  # wakes the threads
    times = []
    for _ in range(count):
        started = time.perf_counter()
        fusion.backend.decode(row)
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    sys.exit(main())
