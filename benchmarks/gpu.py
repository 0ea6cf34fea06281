"""Measure a bundle on a GPU against the eager interpreter and the bandwidth roofline.

    fusion-export CHECKPOINT -o BUNDLE --int4 --target cuda     # or tensorrt, then fusion-build BUNDLE
    python -m fusion_edge.benchmarks.gpu --bundle BUNDLE --eager --json FILE

One image and one question with random inputs: global crops, alignment, local crop, prefill, decode. The eager
interpreter runs in float16 on the bundle's dequantized weights.
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
from fusion_edge.export.planning.traffic import moved_tokens
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime.backends.base import Backend
from fusion_edge.runtime.backends.devices import AUTO, NAMES, open_device
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.formatting import format_bytes, format_table
from fusion_edge.runtime.images.grids import alignment_cells
from fusion_edge.runtime.system.output_file import write_whole

QUESTION_TOKENS = 24
COPY_BYTES = 1 << 28
REPEATS = 5


@dataclass(frozen=True)
class StageMedians:
    """Median seconds of :data:`REPEATS` runs; loading runs once."""

    name: str
    load: float
    encode_global: float
    alignment: float
    encode_local: float
    prefill: float
    decode_step: float
    memory: int
    """GPU bytes in use beyond those before loading; 0 on a CPU."""

    @property
    def ttft(self) -> float:
        """Time to first token of a first question, without preprocessing."""
        return self.encode_global + self.alignment + self.encode_local + self.prefill


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle folder written by fusion-export")
    add("--device", choices=(AUTO, *NAMES), default=AUTO, help="default: %(default)s")
    add("--eager", action="store_true", help="also measure the eager interpreter in float16 on the same GPU")
    add("--steps", type=positive_integer, default=64, help="decode steps (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.bundle)
    before, started = _used_memory(), time.perf_counter()
    device, backend = open_device(bundle, options.device)
    loaded = time.perf_counter() - started
    measured = [measure(backend, bundle.manifest, loaded, before, options.steps)]
    cached_tokens = None
    if device.name.startswith("tensorrt"):
        last = prompt_tokens(bundle.manifest) + options.steps
        cached_tokens = moved_tokens(min(last, backend.max_context), backend.max_context)
    backend.close()
    if options.eager:
        gpu = "cpu" if device.name == "cpu" else "cuda"
        before, started = _used_memory(), time.perf_counter()
        eager = EagerBackend(bundle.manifest.model, BundleWeights(bundle), gpu, torch.float16)
        measured.append(measure(eager, bundle.manifest, time.perf_counter() - started, before, options.steps))
    bandwidth = _bandwidth("cpu" if device.name == "cpu" else "cuda")
    bytes_read = step_bytes(bundle.manifest, cached_tokens)
    roofline = bytes_read / bandwidth
    result: dict[str, Any] = {
        "bundle": bundle.manifest.source,
        "precision": bundle.manifest.precision,
        "device": device.name,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "decode_step_bytes": bytes_read,
        "bandwidth": round(bandwidth),
        "decode_roofline_seconds": roofline,
        "decode_roofline_share": roofline / measured[0].decode_step,
        "runs": [asdict(one) | {"ttft": one.ttft} for one in measured],
    }
    sys.stdout.write(_text(measured, result))
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def measure(backend: Backend, manifest: Manifest, loaded: float, memory_before: int, steps: int) -> StageMedians:
    """One image and one question, stage by stage, each once untimed before."""
    config, rng = manifest.model, np.random.default_rng(0)
    width, latents = config.language.hidden_size, manifest.query_lengths[0]

    def floats(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    pixels, words = floats(GLOBAL_CROPS, 3, IMAGE_SIZE, IMAGE_SIZE), floats(1, QUESTION_TOKENS, width)
    nothing, all_words = floats(GLOBAL_CROPS, 0, width), np.ones((1, QUESTION_TOKENS), np.bool_)
    tables = alignment_cells(2 * config.vision.grid, latents, config.alignment.window_size)
    features = backend.encode(pixels, nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_))
    image = backend.align(features, *tables)
    rows = floats(prompt_tokens(manifest), width)
    places = np.arange(len(rows) - latents - QUESTION_TOKENS, len(rows) - QUESTION_TOKENS)[None]
    last, capacity = np.array([len(rows) - 1]), min(backend.max_context, len(rows) + steps)

    def prefill() -> None:
        backend.prefill(rows, image, places, last, capacity)

    prefill()
    memory = max(_used_memory() - memory_before, 0)
    prefilled = _median(prefill)
    times = [timed(lambda: backend.decode(rows[0])) for _ in range(capacity - len(rows))]
    return StageMedians(
        name=backend.name,
        load=loaded,
        encode_global=_median(
            lambda: np.asarray(backend.encode(pixels, nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_)))
        ),
        alignment=_median(lambda: backend.align(features, *tables)),
        encode_local=_median(lambda: np.asarray(backend.encode(pixels[:1], words, all_words))),
        prefill=prefilled,
        decode_step=statistics.median(times),
        memory=memory,
    )


def prompt_tokens(manifest: Manifest) -> int:
    """Return the tokens of a typical prompt."""
    return manifest.image_side**2 + manifest.query_lengths[0] + 2 * QUESTION_TOKENS


def step_bytes(manifest: Manifest, cached_tokens: int | None = None) -> int:
    """Return the bytes that a decode step reads: LLM weights and KV cache, by default that of a typical prompt."""
    if cached_tokens is None:
        cached_tokens = prompt_tokens(manifest)
    return weight_bytes(manifest) + cache_bytes(manifest, cached_tokens)


def _bandwidth(device: str) -> float:
    """Return the bytes per second that a copy reads and writes."""
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
    """Return the GPU bytes in use by all processes."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _text(measured: list[StageMedians], result: dict[str, Any]) -> str:
    header = ("", "TTFT", "prefill", "decode step", "tokens/s", "GPU memory")
    rows: list[tuple[str, ...]] = [header]
    for one in measured:
        times = (f"{1000 * seconds:.2f} ms" for seconds in (one.ttft, one.prefill, one.decode_step))
        rows.append((one.name, *times, f"{1 / one.decode_step:.1f}", format_bytes(one.memory)))
    if len(measured) > 1:
        ours, eager = measured
        faster = eager.prefill / ours.prefill, eager.decode_step / ours.decode_step
        rows.append(("speedup", "", *(f"{times:.1f}" for times in faster), "", ""))
    roofline = (
        f"A decode step reads {format_bytes(result['decode_step_bytes'])}: "
        f"{1000 * result['decode_roofline_seconds']:.2f} ms at {format_bytes(result['bandwidth'])}/s. "
        f"It reaches {result['decode_roofline_share']:.0%} of the bandwidth roofline.\n"
    )
    return format_table(rows) + roofline


if __name__ == "__main__":
    sys.exit(main())
