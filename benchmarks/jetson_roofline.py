"""What a bundle takes of a Jetson, and what it cannot be faster than there: computed, never measured.

    python -m fusion_edge.benchmarks.full_size_checkpoint --layout 3b --sparse --output fusion-3b
    python -m fusion_edge.benchmarks.jetson_roofline fusion-3b

A step must read the LLM's weights and the whole KV cache, so the memory's bandwidth limits it. The first token of an
answer needs the products and the attention of vision, alignment and prefill; the rate of float16 products limits that.
Operations are counted by running the model on tensors without values.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fusion_edge.benchmarks.gpu import QUESTION_TOKENS, step_bytes
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.model import architecture
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.export.planning.memory import estimate
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import ExportPlan, plan_export
from fusion_edge.export.planning.presets import PRESETS
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE, side
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.formatting import format_bytes, format_table
from fusion_edge.runtime.images.grids import pooling_cells

TERA = 1e12


@dataclass(frozen=True)
class Device:
    """A Jetson in its fastest power mode, as NVIDIA's product pages have it."""

    name: str
    preset: str
    bandwidth: float
    """Bytes a second."""
    rate: float
    """Float16 operations a second of the GPU's tensor cores, without sparsity."""


DEVICES = (
    # Of sparse INT8 operations a quarter are float16 ones without sparsity, of sparse FP4 ones an eighth.
    Device("Orin Nano 8 GB", "jetson-orin-nano", 102e9, 67 * TERA / 4),
    Device("AGX Orin 64 GB", "jetson-orin", 204.8e9, 170 * TERA / 4),
    Device("AGX Thor", "jetson-thor", 273e9, 2070 * TERA / 8),
)


@dataclass(frozen=True)
class Limits:
    """Of one device."""

    device: str
    max_context: int
    memory: int
    """Bytes, by the estimate of ``fusion-export --dry-run``."""
    fits: bool
    """In the memory that the preset counts on."""
    step_bytes: int
    image_operations: int
    """What only an image decides: its global crops, the alignment decoder."""
    question_operations: int
    """The local crop with a question, and the prefill."""
    tokens_per_second: float
    """At the most."""
    first_answer: float
    """Seconds to the first token about an image, at the least."""
    further_answer: float
    """Seconds to the first token of a further question about it."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder of a checkpoint; its weights are not read")
    add("--max-context", type=positive_integer, metavar="N", help="positions of the KV cache (default: the preset's)")
    add("--json", action="store_true", help="print JSON")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    with Checkpoint(options.checkpoint) as checkpoint:
        all_limits = [limits(checkpoint, device, options.max_context) for device in DEVICES]
    if options.json:
        sys.stdout.write(json.dumps([asdict(one) for one in all_limits], indent=1) + "\n")
        return 0
    header = ("", "positions", "memory", "fits", "a step reads", "tokens/s <=", "first token >=", "further >=")
    rows: list[tuple[str, ...]] = [header]
    for one in all_limits:
        memory = (format_bytes(one.memory), "yes" if one.fits else "no", format_bytes(one.step_bytes))
        seconds = (f"{seconds:.2f} s" for seconds in (one.first_answer, one.further_answer))
        rows.append((one.device, str(one.max_context), *memory, f"{one.tokens_per_second:.0f}", *seconds))
    sys.stdout.write(format_table(rows))
    return 0


def limits(checkpoint: Checkpoint, device: Device, max_context: int | None = None) -> Limits:
    """Of a checkpoint, exported with the device's preset. Raises as :func:`plan_export`."""
    plan = plan_export(checkpoint, ExportOptions(target=device.preset, max_context=max_context))
    memory, read = estimate(plan).peak, step_bytes(plan.manifest(()), plan.options.max_context)
    image, question = operations(plan)
    return Limits(
        device=device.name,
        max_context=plan.options.max_context,
        memory=memory,
        fits=memory <= PRESETS[device.preset].memory,
        step_bytes=read,
        image_operations=image,
        question_operations=question,
        tokens_per_second=device.bandwidth / read,
        first_answer=(image + question) / device.rate,
        further_answer=question / device.rate,
    )


def operations(plan: ExportPlan) -> tuple[int, int]:
    """Multiplications and additions that an image takes, and a short question about it, at the default query length."""
    config, image_tokens = plan.config, plan.options.image_tokens
    latents, width = plan.options.query_lengths[0], config.language.hidden_size
    cells = [
        torch.from_numpy(pooling_cells(2 * config.vision.grid, count)).to("meta")
        for count in (side(latents), side(latents) * config.alignment.window_size)
    ]
    ops = EagerOperations(config, cache(lambda name: _meta(*plan.parameters[name].shape)))

    def encode(crops: int, text: int) -> Tensor:
        pixels = _meta(crops, 3, IMAGE_SIZE, IMAGE_SIZE)
        return architecture.vision_encoder(ops, config, pixels, _meta(crops, text, width), _meta(crops, text))

    def of_image() -> None:
        architecture.alignment_decoder(ops, config, encode(GLOBAL_CROPS, 0), *cells)

    def of_question() -> None:
        encode(1, QUESTION_TOKENS)
        pairs = _meta(config.alignment.layers, latents, config.alignment.window_size**2, width)
        positions = _meta(1, latents).long(), _meta(1).long()
        prompt = _meta(1, image_tokens + latents + 2 * QUESTION_TOKENS, width)
        architecture.llm(ops, config, prompt, architecture.Alignment(*positions, pairs, pairs))

    return _counted(of_image), _counted(of_question)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@torch.inference_mode()
def _counted(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    total: int = counter.get_total_flops()
    return total


if __name__ == "__main__":
    sys.exit(main())
