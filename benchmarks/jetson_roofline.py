"""Compute the memory of a bundle on each Jetson and the rooflines of its speed. Nothing is measured.

    python -m fusion_edge.benchmarks.full_size_checkpoint --layout 3b --sparse --output fusion-3b
    python -m fusion_edge.benchmarks.jetson_roofline fusion-3b

Decode is bound by memory bandwidth: a decode step reads the LLM's weights and a window of the KV cache. Time to first
token is bound by float16 compute throughput: GEMMs and attention of vision, alignment and prefill. Operations are
counted by running the model on meta tensors.
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

from fusion_edge.benchmarks.latency.backend_stages import QUESTION_TOKENS, prompt_tokens
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.model import architecture
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.export.planning.memory import estimate, plan_for_memory
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.export.planning.presets import PRESETS
from fusion_edge.export.planning.traffic import decode_steps
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.formatting import format_bytes, format_table
from fusion_edge.runtime.images.grids import alignment_cells

TERA = 1e12
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Module:
    """Module of a Jetson in its fastest power mode, with figures from NVIDIA's product pages."""

    name: str
    preset: str
    compute: float
    """Dense float16 operations per second of the GPU's tensor cores."""


MODULES = (
    # Dense float16 is a quarter of sparse INT8 and an eighth of sparse FP4.
    Module("Orin Nano 8 GB", "jetson-orin-nano", 67 * TERA / 4),
    Module("AGX Orin 64 GB", "jetson-orin", 170 * TERA / 4),
    Module("AGX Thor", "jetson-thor", 2070 * TERA / 8),
)


@dataclass(frozen=True)
class JetsonEstimate:
    """Memory and rooflines of a bundle on one module."""

    device: str
    max_context: int
    memory: int
    """Bytes, as ``fusion-export --dry-run`` estimates them."""
    fits: bool
    """Whether that fits the memory of the preset."""
    step_bytes: int
    image_operations: int
    """Operations that run once per image: global crops and alignment decoder."""
    question_operations: int
    """Operations that run per question: local crop and prefill."""
    decode_tokens_per_second: float
    """At the bandwidth roofline."""
    ttft: float
    """Seconds at the compute roofline."""
    followup_ttft: float
    """Seconds at the compute roofline."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint folder; its weights are not read")
    add("--max-context", type=positive_integer, metavar="N", help="tokens of the KV cache (default: the preset's)")
    add("--json", action="store_true", help="print JSON")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    with Checkpoint(options.checkpoint) as checkpoint:
        estimates = [jetson_estimate(checkpoint, module, options.max_context) for module in MODULES]
    if options.json:
        sys.stdout.write(json.dumps([asdict(one) for one in estimates], indent=1) + "\n")
        return 0
    header = ("", "context", "memory", "fits", "read per step", "tokens/s <=", "TTFT >=", "follow-up >=")
    rows: list[tuple[str, ...]] = [header]
    for one in estimates:
        memory = (format_bytes(one.memory), "yes" if one.fits else "no", format_bytes(one.step_bytes))
        seconds = (f"{seconds:.2f} s" for seconds in (one.ttft, one.followup_ttft))
        rows.append((one.device, str(one.max_context), *memory, f"{one.decode_tokens_per_second:.0f}", *seconds))
    sys.stdout.write(format_table(rows))
    return 0


def jetson_estimate(checkpoint: Checkpoint, module: Module, max_context: int | None = None) -> JetsonEstimate:
    """Estimate a checkpoint exported with the module's preset. Raises the errors of :func:`plan_for_memory`."""
    plan = plan_for_memory(checkpoint, ExportOptions(target=module.preset, max_context=max_context), None)
    bandwidth = PRESETS[module.preset].bandwidth
    assert bandwidth is not None  # every preset of a Jetson has it
    memory = estimate(plan).peak
    length = min(prompt_tokens(plan.manifest(())) + ANSWER_TOKENS, plan.options.max_context)
    read = next(step.fused for window, step in decode_steps(plan).items() if window >= length)
    image, question = operations(plan)
    return JetsonEstimate(
        device=module.name,
        max_context=plan.options.max_context,
        memory=memory,
        fits=memory <= PRESETS[module.preset].memory,
        step_bytes=read,
        image_operations=image,
        question_operations=question,
        decode_tokens_per_second=bandwidth / read,
        ttft=(image + question) / module.compute,
        followup_ttft=question / module.compute,
    )


def operations(plan: ExportPlan) -> tuple[int, int]:
    """Return the floating-point operations per image and per short question, at the default query length."""
    config = plan.config
    latents, width = plan.options.query_lengths[0], config.language.hidden_size
    cells = [
        torch.from_numpy(cells).to("meta")
        for cells in alignment_cells(2 * config.vision.grid, latents, config.alignment.window_size)
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
        prompt = _meta(1, prompt_tokens(plan.manifest(())), width)
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
