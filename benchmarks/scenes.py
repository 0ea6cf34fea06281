"""Measure the time to the first token of further questions about one picture: exact, and behind a scene.

    python -m fusion_edge.benchmarks.scenes BUNDLE --json FILE

For each level of detail (``fusion-export --detail``) that the bundle's query lengths allow. The rounds interleave what
is compared, so that other load of the machine slows all of it down.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.rounds import rounds_parser, write_result
from fusion_edge.export.planning.presets import DETAILS, Detail
from fusion_edge.runtime.bundle.config import side
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.sampling import Sampling

GUIDE = "Is the path in front of the robot clear, and what is on it?"
QUESTIONS = ("Is the path clear?", "How many people do you see?")
ONE_TOKEN = Sampling(max_new_tokens=1)


@dataclasses.dataclass(frozen=True)
class DetailTimes:
    """Seconds of every round."""

    image_tokens: int
    latents: int
    first_token: list[float]
    """First question about a picture."""
    exact_followup: list[float]
    """Another question about it."""
    look: list[float]
    """Look with a guide at a picture whose features are cached."""
    scene_followup: list[float]
    """Question behind a scene."""

    @property
    def ratio(self) -> float:
        """Question behind a scene, as a share of an exact one."""
        return statistics.median(self.scene_followup) / statistics.median(self.exact_followup)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command(_main, rounds_parser(__doc__, 5).parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    machine = machine_info(None)
    with load(options.bundle, device="cpu") as fusion:
        offered = fusion.manifest.query_lengths
        details = {name: detail for name, detail in DETAILS.items() if detail.latents in offered}
        if not details:
            raise UsageError(f"The bundle offers {', '.join(map(str, offered))} latents; expected 144, 64 or 16.")
        measure(fusion, list(details.values())[-1], 1)  # reads the weights
        times = {name: measure(fusion, detail, options.rounds) for name, detail in details.items()}
        cache, precision = fusion.manifest.cache, fusion.manifest.precision
    sys.stdout.write(table(times))
    if options.json:
        results = {name: dataclasses.asdict(one) | {"ratio": one.ratio} for name, one in times.items()}
        measured = {"precision": precision, "cache": cache, "details": results}
        write_result(options.json, "scenes BUNDLE", options.rounds, machine, measured)
    return 0


def measure(fusion: Fusion, detail: Detail, rounds: int) -> DetailTimes:
    """Measure a level of detail. The weights of a bundle do not depend on it."""
    patches = fusion.config.vision.patches
    tokens = min(detail.image_tokens or patches, patches)
    manifest = dataclasses.replace(fusion.manifest, image_side=side(tokens))
    model = Fusion(manifest, fusion.backend, fusion.tokenizer, fusion.embed)
    measured = [_round(model, detail.latents, _picture(number)) for number in range(rounds)]
    return DetailTimes(tokens, detail.latents, *(list(seconds) for seconds in zip(*measured, strict=True)))


def _round(model: Fusion, latents: int, picture: Image.Image) -> tuple[float, float, float, float]:
    """Return the seconds of two questions about a picture, of a look at it, and of a question behind the scene."""

    def ask(question: str) -> None:
        model.answer(picture, question, sampling=ONE_TOKEN, query_length=latents)

    first, second = (_seconds(partial(ask, question)) for question in QUESTIONS)
    started = time.perf_counter()
    with model.look(picture, GUIDE, query_length=latents) as scene:
        looked = time.perf_counter() - started
        behind = _seconds(lambda: scene.answer(QUESTIONS[1], sampling=ONE_TOKEN))
    return first, second, looked, behind


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (480, 640, 3), np.uint8))


def table(times: dict[str, DetailTimes]) -> str:
    """Format the medians."""
    header = ("detail", "image tokens", "latents", "first token", "exact follow-up", "look", "behind a scene", "ratio")
    rows: list[tuple[str, ...]] = [header]
    for name, one in times.items():
        seconds = (one.first_token, one.exact_followup, one.look, one.scene_followup)
        medians = (f"{statistics.median(values):.2f} s" for values in seconds)
        rows.append((name, str(one.image_tokens), str(one.latents), *medians, f"{one.ratio:.3f}"))
    return format_table(rows)


if __name__ == "__main__":
    sys.exit(main())
