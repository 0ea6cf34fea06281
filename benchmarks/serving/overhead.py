"""What fusion-serve adds to ``Fusion.answer``, at equal work on both sides.

    python -m fusion_edge.benchmarks.serving.overhead BUNDLE --json FILE

One client asks over HTTP and in this process, by turns. A known picture: both sides have its crops and its features. A
new picture: both cut and encode it; the server also decodes base64 and PNG, while ``Fusion.answer`` gets pixels. The
result has the time of that decoding, too.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.serving.server_process import (
    Client,
    body,
    milliseconds,
    percentile,
    picture,
    server_process,
)
from fusion_edge.runtime import Answer, Fusion, load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.images.encoded import decode
from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.requests import Crops
from fusion_edge.runtime.system.output_file import write_whole

QUESTION = "What color is it?"
CACHED_IMAGES = 4
KNOWN = 0
"""Seed of the known picture; new ones have higher seeds."""
WARM_UP = 5


@dataclass
class Seconds:
    """Seconds of the same questions on both sides."""

    direct: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)

    def overhead(self) -> float:
        """Return by how many milliseconds the medians differ."""
        return round(1000 * (percentile(self.served, 50) - percentile(self.direct, 50)), 2)

    def summary(self) -> dict[str, Any]:
        """Return percentiles of both sides in milliseconds, and the difference of the medians."""
        return {
            "answer_ms": milliseconds(self.direct),
            "http_ms": milliseconds(self.served),
            "overhead_p50_ms": self.overhead(),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("bundle", type=Path, help="bundle folder")
    add("--starts", type=positive_integer, default=8, help="of both sides, by turns (default: %(default)s)")
    add("--questions", type=positive_integer, default=100, help="of each kind, in each start (default: %(default)s)")
    add("--threads", type=positive_integer, default=2, help="of each side (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    known, new, decoding = list[Seconds](), list[Seconds](), list[float]()
    loads, numbers = list[float](), itertools.count(KNOWN + 1)
    for start in range(options.starts):  # a process keeps its memory layout, which moves all of its times
        loads.append(round(os.getloadavg()[0], 2))
        server_options = ["--cached-images", str(CACHED_IMAGES), "--threads", str(options.threads)]
        with (
            load(options.bundle, cached_images=CACHED_IMAGES, threads=options.threads) as fusion,
            server_process(options.bundle, server_options) as server,
        ):
            pairs = by_turns(fusion, server.client(), numbers)
            for _ in range(WARM_UP):
                next(pairs)
            known.append(Seconds())
            new.append(Seconds())
            for _ in range(options.questions):
                for kind, (direct, served) in zip((known, new), next(pairs), strict=True):
                    kind[-1].direct.append(direct)
                    kind[-1].served.append(served)
        decoding += decoding_seconds(options.questions)
        sys.stderr.write(f"start {start + 1} of {options.starts}: {known[-1].overhead()} ms, {new[-1].overhead()} ms\n")
    decoded = round(1000 * statistics.median(decoding), 2)
    result = {
        "command": f"python -m fusion_edge.benchmarks.serving.overhead BUNDLE --starts {options.starts} "
        f"--questions {options.questions} --threads {options.threads}",
        "machine": asdict(machine_info(None)),
        "load_averages": loads,
        "body_bytes": len(body(picture(KNOWN), QUESTION)),
        "known_picture": _summary(known),
        "new_picture": _summary(new)
        | {
            "decoding_p50_ms": decoded,
            "overhead_without_decoding_p50_ms": round(_summary(new)["overhead_p50_ms"] - decoded, 2),
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        write_whole(options.json, text)
    return 0


def by_turns(
    fusion: Fusion, client: Client, numbers: Iterator[int]
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Ask about the known picture and about a new one on both sides. Yields pairs of seconds: direct, served."""
    crops = Crops(cut_crops(Image.fromarray(picture(KNOWN))))
    known = body(picture(KNOWN), QUESTION)
    for turn in itertools.count():
        pixels = picture(next(numbers))
        new = body(pixels, QUESTION)
        yield (
            _pair(turn, lambda: _ask(fusion, crops), lambda: _post(client, known)),
            _pair(turn, lambda: _ask(fusion, pixels), lambda: _post(client, new)),  # noqa: B023 (called at once)
        )


def _pair(
    turn: int, direct: Callable[[], tuple[float, str]], served: Callable[[], tuple[float, str]]
) -> tuple[float, float]:
    """Return the seconds of both sides; each of them is the first one every other time."""
    if turn % 2:
        (answered, right), (taken, text) = direct(), served()
    else:
        (taken, text), (answered, right) = served(), direct()
    assert text == right
    return answered, taken


def _ask(fusion: Fusion, subject: Any) -> tuple[float, str]:
    start = time.perf_counter()
    answer: Answer = fusion.answer(subject, QUESTION)
    return time.perf_counter() - start, answer.text


def _post(client: Client, request: bytes) -> tuple[float, str]:
    response = client.request("POST", "/v1/chat/completions", request)
    return response.seconds, json.loads(response.body)["choices"][0]["message"]["content"]


def decoding_seconds(count: int) -> list[float]:
    """Return the seconds that base64 and PNG of a picture take, as in the server."""
    url = json.loads(body(picture(KNOWN), QUESTION))["messages"][0]["content"][1]["image_url"]["url"]
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        image = decode(base64.b64decode(url.partition(",")[2], validate=True), 1 << 24).image
        taken.append(time.perf_counter() - start)
    assert np.array_equal(np.asarray(image), picture(KNOWN))
    return taken


def _summary(starts: Sequence[Seconds]) -> dict[str, Any]:
    together = Seconds()
    for each in starts:
        together.direct += each.direct
        together.served += each.served
    each_ms = [each.overhead() for each in starts]
    return together.summary() | {"overhead_p50_ms_of_each_start": each_ms}


if __name__ == "__main__":
    sys.exit(main())
