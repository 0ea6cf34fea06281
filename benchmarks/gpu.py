"""A bundle on a GPU, end to end, beside the eager interpreter and what the memory's bandwidth allows.

    fusion-export CHECKPOINT -o BUNDLE --int4 --target cuda     # or tensorrt, then fusion-build BUNDLE
    python -m fusion_edge.benchmarks.gpu --bundle BUNDLE --eager --json FILE

One image, one question: vision of the image, alignment, vision of the question, prefill, steps; all random, so answers
say nothing. The eager interpreter computes in float16 with the weights that the bundle holds, dequantized.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_edge.benchmarks.latency.roofline import cache_bytes, weight_bytes
from fusion_edge.benchmarks.latency.statistics import timed
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime.backends.base import Backend
from fusion_edge.runtime.backends.devices import AUTO, NAMES, open_device
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE, side
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.formatting import format_bytes, format_table
from fusion_edge.runtime.images.grids import pooling_cells
from fusion_edge.runtime.system.output_file import write_whole

QUESTION_TOKENS = 24
COPY_BYTES = 1 << 28
REPEATS = 5


@dataclass(frozen=True)
class Measured:
    """Seconds, medians of :data:`REPEATS` but for loading."""

    name: str
    load: float
    vision_of_image: float
    alignment: float
    vision_of_question: float
    prefill: float
    step: float
    memory: int
    """Bytes of the device in use more than before loading; on a CPU 0."""

    @property
    def time_to_first_token(self) -> float:
        """Of the first question about an image, without cutting its crops."""
        return self.vision_of_image + self.alignment + self.vision_of_question + self.prefill


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="folder that fusion-export wrote")
    add("--device", choices=(AUTO, *NAMES), default=AUTO, help="(default: %(default)s)")
    add("--eager", action="store_true", help="measure the eager interpreter in float16 on the same GPU, too")
    add("--steps", type=positive_integer, default=64, help="one-token steps (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write the result here, too")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.bundle)
    before, started = _used_memory(), time.perf_counter()
    device, backend = open_device(bundle, options.device)
    loaded = time.perf_counter() - started
    measured = [measure(backend, bundle.manifest, loaded, before, options.steps)]
    positions = backend.max_context if device.name.startswith("tensorrt") else None
    backend.close()
    if options.eager:
        gpu = "cpu" if device.name == "cpu" else "cuda"
        before, started = _used_memory(), time.perf_counter()
        eager = EagerBackend(bundle.manifest.model, BundleWeights(bundle), gpu, torch.float16)
        measured.append(measure(eager, bundle.manifest, time.perf_counter() - started, before, options.steps))
    bandwidth = _bandwidth("cpu" if device.name == "cpu" else "cuda")
    bytes_read = step_bytes(bundle.manifest, positions)
    limit = bytes_read / bandwidth
    result: dict[str, Any] = {
        "bundle": bundle.manifest.source,
        "precision": bundle.manifest.precision,
        "device": device.name,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bytes_a_step_reads": bytes_read,
        "bandwidth": round(bandwidth),
        "step_limit": limit,
        "share_of_limit": limit / measured[0].step,
        "runs": [asdict(one) | {"time_to_first_token": one.time_to_first_token} for one in measured],
    }
    sys.stdout.write(_text(measured, result))
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def measure(backend: Backend, manifest: Manifest, loaded: float, memory_before: int, steps: int) -> Measured:
    """One image and one question, stage by stage, each once untimed before."""
    config, rng = manifest.model, np.random.default_rng(0)
    width, latents = config.language.hidden_size, manifest.query_lengths[0]

    def floats(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    pixels, words = floats(GLOBAL_CROPS, 3, IMAGE_SIZE, IMAGE_SIZE), floats(1, QUESTION_TOKENS, width)
    nothing, all_words = floats(GLOBAL_CROPS, 0, width), np.ones((1, QUESTION_TOKENS), np.bool_)
    size, cells = 2 * config.vision.grid, side(latents)
    tables = pooling_cells(size, cells), pooling_cells(size, cells * config.alignment.window_size)
    features = backend.encode(pixels, nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_))
    image = backend.align(features, *tables)
    rows = floats(manifest.image_side**2 + latents + 2 * QUESTION_TOKENS, width)
    places = np.arange(len(rows) - latents - QUESTION_TOKENS, len(rows) - QUESTION_TOKENS)[None]
    last, capacity = np.array([len(rows) - 1]), min(backend.max_context, len(rows) + steps)

    def prefill() -> None:
        backend.prefill(rows, image, places, last, capacity)

    prefill()
    memory = max(_used_memory() - memory_before, 0)
    prefilled = _median(prefill)
    times = [timed(lambda: backend.decode(rows[0])) for _ in range(capacity - len(rows))]
    return Measured(
        name=backend.name,
        load=loaded,
        vision_of_image=_median(
            lambda: np.asarray(backend.encode(pixels, nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_)))
        ),
        alignment=_median(lambda: backend.align(features, *tables)),
        vision_of_question=_median(lambda: np.asarray(backend.encode(pixels[:1], words, all_words))),
        prefill=prefilled,
        step=statistics.median(times),
        memory=memory,
    )


def step_bytes(manifest: Manifest, positions: int | None = None) -> int:
    """What a one-token step must read: the LLM's weights and ``positions`` of the KV cache, or a typical prompt's."""
    if positions is None:
        positions = manifest.image_side**2 + manifest.query_lengths[0] + 2 * QUESTION_TOKENS
    return weight_bytes(manifest) + cache_bytes(manifest, positions)


def _bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    copy()
    return 2 * COPY_BYTES / _median(copy)


def _median(action: Callable[[], object]) -> float:
    return statistics.median(timed(action) for _ in range(REPEATS))


def _used_memory() -> int:
    """Bytes of the GPU that are in use, by whomever."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _text(measured: list[Measured], result: dict[str, Any]) -> str:
    header = ("", "first token", "prefill", "step", "tokens/s", "device memory")
    rows: list[tuple[str, ...]] = [header]
    for one in measured:
        times = (f"{1000 * seconds:.2f} ms" for seconds in (one.time_to_first_token, one.prefill, one.step))
        rows.append((one.name, *times, f"{1 / one.step:.1f}", format_bytes(one.memory)))
    if len(measured) > 1:
        ours, eager = measured
        faster = eager.prefill / ours.prefill, eager.step / ours.step
        rows.append(("times as fast", "", *(f"{times:.1f}" for times in faster), "", ""))
    limit = (
        f"A step must read {format_bytes(result['bytes_a_step_reads'])}; at {format_bytes(result['bandwidth'])}/s "
        f"(a copy's) {1000 * result['step_limit']:.2f} ms: {result['share_of_limit']:.0%} of the limit is reached.\n"
    )
    return format_table(rows) + limit


if __name__ == "__main__":
    sys.exit(main())
