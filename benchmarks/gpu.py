"""Measure a bundle on a GPU against the eager interpreter and the bandwidth roofline.

    fusion-export CHECKPOINT -o BUNDLE --int4 --target cuda     # or tensorrt, then fusion-build BUNDLE
    python -m fusion_edge.benchmarks.gpu --bundle BUNDLE --eager --json FILE

One image and one question with random inputs: global crops, alignment, local crop, prefill, decode. The eager
interpreter runs in float16 on the bundle's dequantized weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusion_edge.benchmarks.latency.backend_stages import (
    StageMedians,
    measure,
    median_seconds,
    prompt_tokens,
    step_bytes,
)
from fusion_edge.export.planning.traffic import moved_tokens
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime.backends.devices import AUTO, NAMES, open_device
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.formatting import format_bytes, format_table
from fusion_edge.runtime.system.output_file import write_whole

COPY_BYTES = 1 << 28


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
    measured = [measure(backend, bundle.manifest, loaded, options.steps, partial(_memory_beyond, before))]
    cached_tokens = None
    if device.name.startswith("tensorrt"):
        last = prompt_tokens(bundle.manifest) + options.steps
        most, has_per_token_scales = backend.max_context, bundle.manifest.has_per_token_scales
        cached_tokens = moved_tokens(min(last, most), most, has_per_token_scales)
    backend.close()
    if options.eager:
        gpu = "cpu" if device.name == "cpu" else "cuda"
        without_eager, started = _used_memory(), time.perf_counter()
        eager = EagerBackend(bundle.manifest.model, BundleWeights(bundle), gpu, torch.float16)
        loaded = time.perf_counter() - started
        used = partial(_memory_beyond, without_eager)
        measured.append(measure(eager, bundle.manifest, loaded, options.steps, used))
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


def _bandwidth(device: str) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source, target = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    copy()
    return 2 * COPY_BYTES / median_seconds(copy)


def _used_memory() -> int:
    """Return the GPU bytes in use by all processes."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _memory_beyond(before: int) -> int:
    return max(_used_memory() - before, 0)


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
