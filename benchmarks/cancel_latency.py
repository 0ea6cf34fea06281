"""Measure the time from ``cancel()`` to the end of a question, at random moments of it.

    python -m fusion_edge.benchmarks.cancel_latency BUNDLE --cancels 100 --json FILE

Every question encodes its image anew, so that each stage is reached. The tokens of an answer that is cut short must be
the first ones of the complete answer; after every tenth cancel the complete answer is compared. Exit code 1: a wrong
answer, or a cancel that took longer than the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.runtime import Fusion, Sampling, Stopped, load
from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.progress import Progress

Pixels = npt.NDArray[np.uint8]

LIMIT_SECONDS = 0.1
NEW_TOKENS = 16
QUESTION = "Is the path clear?"
COMPARED_EVERY = 10


@dataclass(frozen=True)
class Cancel:
    """A question that was canceled."""

    stage: str
    seconds: float
    """From ``cancel()`` to the end of the question."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--cancels", type=positive_integer, default=100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    with load(options.bundle) as fusion:
        _ask(fusion, picture)  # reads the weights
        started = time.perf_counter()
        expected = _ask(fusion, picture).token_ids
        duration = time.perf_counter() - started
        moments, wrong = random.Random(options.seed), 0
        cancels: list[Cancel] = []
        with Progress("Canceling", options.cancels, None) as progress:
            while len(cancels) < options.cancels:
                cancel, token_ids = _cancel(fusion, picture, moments.uniform(0, duration))
                wrong += token_ids != expected[: len(token_ids)]
                if cancel is None:
                    continue
                cancels.append(cancel)
                progress.advance(1)
                if len(cancels) % COMPARED_EVERY == 0:
                    wrong += _ask(fusion, picture).token_ids != expected
    result = _result(cancels, wrong, duration)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    return 0 if wrong == 0 and all(cancel.seconds <= LIMIT_SECONDS for cancel in cancels) else 1


def _ask(fusion: Fusion, picture: Pixels) -> Answer:
    fusion.clear_image_cache()
    return fusion.answer(picture, QUESTION, sampling=Sampling(max_new_tokens=NEW_TOKENS))


def _cancel(fusion: Fusion, picture: Pixels, moment: float) -> tuple[Cancel | None, tuple[int, ...]]:
    """Cancel a question ``moment`` seconds after it was asked. Return no cancel if it ended before."""
    outcome: list[Answer | Stopped] = []
    stages: list[str] = []

    def ask() -> None:
        fusion.clear_image_cache()
        sampling = Sampling(max_new_tokens=NEW_TOKENS)
        try:
            outcome.append(fusion.answer(picture, QUESTION, sampling=sampling, on_stage=stages.append))
        except Stopped as error:
            outcome.append(error)
        ended.append(time.perf_counter())

    ended: list[float] = []
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(moment)
    canceled = time.perf_counter()
    fusion.cancel()
    thread.join()
    (end,) = outcome
    answer = end.partial if isinstance(end, Stopped) else end
    if answer.finish_reason != "cancelled":
        return None, answer.token_ids
    return Cancel(stages[-1] if stages else "waiting", ended[0] - canceled), answer.token_ids


def _result(cancels: Sequence[Cancel], wrong: int, duration: float) -> dict[str, object]:
    by_stage: dict[str, list[float]] = defaultdict(list)
    for cancel in cancels:
        by_stage[cancel.stage].append(cancel.seconds)
    seconds = [cancel.seconds for cancel in cancels]
    return {
        "cancels": len(cancels),
        "wrong_answers": wrong,
        "within_limit": sum(value <= LIMIT_SECONDS for value in seconds),
        "limit_seconds": LIMIT_SECONDS,
        "question_seconds": round(duration, 3),
        "median_seconds": round(float(np.median(seconds)), 4),
        "largest_seconds": round(max(seconds), 4),
        "stages": {
            stage: {"cancels": len(values), "largest_seconds": round(max(values), 4)}
            for stage, values in by_stage.items()
        },
        "processor": machine_info(None).processor,
    }


if __name__ == "__main__":
    sys.exit(main())
