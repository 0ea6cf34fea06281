"""Measure time and memory of calibrating some LLM blocks of a full-size checkpoint, on random activations.

    python -m fusion_edge.benchmarks.calibrate_blocks --checkpoint FOLDER --work FOLDER --first llm.layers.0 --blocks 2

Random activations show speed and memory, not quality.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from fusion_edge.export.calibration.activation_cache import write_activations
from fusion_edge.export.calibration.blocks import blocks
from fusion_edge.export.calibration.estimate import estimate_calibration
from fusion_edge.export.calibration.options import DEVICES, CalibrationOptions
from fusion_edge.export.calibration.run import CalibrationRun
from fusion_edge.export.calibration.samples import Samples
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.samples import Sample
from fusion_edge.runtime.system.resources import usable_processors

QUESTION = "What is in front of the camera, and how far away is it?"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder of a FUSION checkpoint")
    add("--work", type=Path, required=True, help="empty folder for activations and weights")
    add("--first", default="llm.layers.0", help="first LLM block (default: %(default)s)")
    add("--blocks", type=positive_integer, default=2, help="number of blocks (default: %(default)s)")
    add("--samples", type=positive_integer, default=128, help="calibration samples (default: %(default)s)")
    add("--held-out", type=positive_integer, default=16, help="held-out samples (default: %(default)s)")
    add("--query-len", type=positive_integer, default=144, help="latents (default: %(default)s)")
    add("--device", choices=DEVICES, default="cpu", help="device to calibrate on (default: %(default)s)")
    add("--threads", type=positive_integer, default=usable_processors(), help="PyTorch threads (default: %(default)s)")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    with Checkpoint(options.checkpoint) as checkpoint:
        plan = plan_export(checkpoint, ExportOptions(query_lengths=(options.query_len,)))
        names = [block.name for block in blocks(plan.config)]
        if options.first not in names or not options.first.startswith("llm.layers."):
            raise UsageError(f"--first {options.first} is not an LLM block; choose llm.layers.0 or a later one.")
        options.work.mkdir(parents=True, exist_ok=True)
        picture = options.work / "picture.png"
        Image.new("RGB", (384, 384)).save(picture)
        calibrating, held_out = ((Sample(picture, QUESTION),) * n for n in (options.samples, options.held_out))
        calibration = CalibrationOptions(picture, options.samples, options.held_out, "gptq", options.device)
        estimate = estimate_calibration(plan, calibration)
        work = CalibrationRun(plan, Samples(calibrating, held_out), "gptq", options.device, options.work)
        first = names.index(options.first)
        tokens = _write_activations(work, options, first)
        seconds = []
        with torch.inference_mode():
            for i in range(first, first + options.blocks):
                started = time.monotonic()
                work.run_block(i, lambda: None)
                seconds.append(round(time.monotonic() - started, 1))
    result = {
        "checkpoint": options.checkpoint.name,
        "blocks": names[first : first + options.blocks],
        "samples": options.samples,
        "held_out": options.held_out,
        "tokens": tokens,
        "device": options.device,
        "seconds": seconds,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "estimated_bytes": estimate.memory,
        "estimated_seconds_of_all_blocks": round(estimate.seconds),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


def _write_activations(work: CalibrationRun, options: argparse.Namespace, block: int) -> int:
    """Write random activations in front of a block; return the number of tokens of a sample."""
    generator = torch.Generator().manual_seed(0)
    alignment, hidden = work.config.alignment, work.config.language.hidden_size
    tokens = work.tokens(0)
    windows = 1, options.query_len, alignment.window_size**2, hidden
    with write_activations(work.cache_path(block)) as file:
        for _ in range(options.samples + 2 * options.held_out):
            x = torch.randn(1, tokens, hidden, generator=generator)
            file.append({"x": x, "windows": torch.randn(windows, generator=generator)})
    return tokens


if __name__ == "__main__":
    sys.exit(main())
