"""Estimate of a calibration's memory, disk space and time, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fusion_edge.export.calibration.bit_budget import candidates
from fusion_edge.export.calibration.blocks import Block, blocks
from fusion_edge.export.calibration.options import SENSITIVITY_SAMPLES, CalibrationOptions
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.quant.gptq import CLIP_RATIOS
from fusion_edge.quant.smoothquant import ALPHAS, find_producer
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, MINIMUM_QUESTION

PROCESS_BYTES = 700_000_000  # Python, torch and one sample in a block (measured)
TEXT_TOKENS = 4 * MINIMUM_QUESTION  # template, question and answer of a sample
FLOAT_BYTES, DOUBLE_BYTES = 4, 8
FACTORIZATION_COPIES = 4  # float64 copies of a Hessian during its factorization (FactorizedHessian)
DESCENT_PASSES = 10  # GEMM operations of coordinate descent, per weight and input channel (measured)
ROUNDING_PASSES = 5  # GEMM operations of rounding and of the reported error, likewise
# Cost of other work, in float32 GEMM operations (measured):
SCALE_OPERATIONS = 200  # trying one scale for one weight
COUNT_OPERATIONS = 2000  # adding one value to a channel's histogram
HISTOGRAM_OPERATIONS = 50_000_000  # merging the histogram of one channel
PROBE = 2048  # side of the matrices that measure the compute throughput


@dataclass(frozen=True)
class CalibrationEstimate:
    """Cost of a calibration."""

    memory: int
    """Peak memory of the process, bytes."""
    disk: int
    """Size of the work folder, bytes."""
    seconds: float


def estimate_calibration(plan: ExportPlan, options: CalibrationOptions) -> CalibrationEstimate:
    """Estimate the cost of a calibration from its operations and this machine's measured compute throughput."""
    sequence = blocks(plan.config)
    throughput = _throughput(options.device)
    return CalibrationEstimate(
        memory=PROCESS_BYTES + max(_memory(plan, block, options) for block in sequence),
        disk=calibration_disk(plan, options),
        seconds=(sum(_operations(plan, block, options) for block in sequence) + _sensitivity_operations(plan, options))
        / throughput,
    )


def calibration_disk(plan: ExportPlan, options: CalibrationOptions) -> int:
    """Return the peak bytes of the work folder.

    It holds finished weights, and the activations of all samples before and after a block, twice for held-out ones.
    """
    sequence = blocks(plan.config)
    activations = max(_activation_bytes(plan, block) for block in sequence)
    weights = sum(_linears_bytes(plan, block) for block in sequence)
    return 2 * (options.samples + 2 * options.held_out) * activations + weights


def _linears(plan: ExportPlan, block: Block) -> list[Linear]:
    found = [linear for linear in plan.linears.values() if not linear.is_table]
    return [linear for linear in found if linear.weight.name.startswith(block.prefixes)]


def _quantized(plan: ExportPlan, block: Block) -> list[Linear]:
    """Return the linears that calibration quantizes."""
    return [linear for linear in _linears(plan, block) if linear.is_quantized_here]


def _observed(plan: ExportPlan, block: Block) -> list[Linear]:
    """Return the linears with their own Hessian; the LLM's ``up`` shares that of ``gate``."""
    return [
        linear
        for linear in _quantized(plan, block)
        if not linear.name.startswith("llm.") or not linear.name.endswith("mlp.up")
    ]


def _memory(plan: ExportPlan, block: Block, options: CalibrationOptions) -> int:
    """Return the peak bytes of a block.

    That is the larger of two phases: quantizing (weights, Hessians, a factorization), and running the samples (float
    and quantized weights).
    """
    weights = FLOAT_BYTES * sum(linear.size for linear in _linears(plan, block))
    sides = [linear.inputs for linear in _observed(plan, block)]
    quantizing = weights + DOUBLE_BYTES * (
        sum(n * n for n in sides) + FACTORIZATION_COPIES * max(sides, default=0) ** 2
    )
    return max(quantizing, 2 * weights + _sensitivity_bytes(plan, block, options))


def _sensitivity_bytes(plan: ExportPlan, block: Block, options: CalibrationOptions) -> int:
    """Return the bytes of activations while sensitivity is measured.

    They are those of the float model, and those of each measured linear before and after a block. All share the
    windows.
    """
    trials = 2 * len(_measured(plan, block)) * _llm_rows(plan) * plan.config.language.hidden_size
    return _sensitivity_samples(options) * (_activation_bytes(plan, block) + FLOAT_BYTES * trials)


def _measured(plan: ExportPlan, block: Block) -> list[Linear]:
    """Return the linears whose sensitivity is measured."""
    names = candidates(plan)
    return [linear for linear in _linears(plan, block) if linear.name in names]


def _sensitivity_samples(options: CalibrationOptions) -> int:
    """Return the number of samples for sensitivity."""
    return min(options.sensitivity_samples or SENSITIVITY_SAMPLES, options.samples) if options.has_budget else 0


def _activation_bytes(plan: ExportPlan, block: Block) -> int:
    """Return the bytes of one sample's activations after a block."""
    config = plan.config
    if block.name.startswith("vision."):
        return FLOAT_BYTES * 3 * _vision_rows(plan) * config.vision.width
    windows = plan.options.query_lengths[0] * config.alignment.window_size**2
    return FLOAT_BYTES * (_llm_rows(plan) + windows) * config.language.hidden_size


def _linears_bytes(plan: ExportPlan, block: Block) -> int:
    return sum(linear.size * linear.format.bits // 8 for linear in _quantized(plan, block))


def _vision_rows(plan: ExportPlan) -> int:
    return (GLOBAL_CROPS + 1) * plan.config.vision.patches + MINIMUM_QUESTION


def _llm_rows(plan: ExportPlan) -> int:
    return plan.options.image_tokens + plan.options.query_lengths[0] + TEXT_TOKENS


def _rows(plan: ExportPlan, name: str) -> int:
    """Return the rows of a linear's input, for one sample."""
    q = plan.options.query_lengths[0]
    if name.startswith("vision.text_projector"):
        return MINIMUM_QUESTION
    if name.startswith("vision."):
        return _vision_rows(plan)
    if name.startswith("llm.lm_head"):
        return TEXT_TOKENS // 2
    if name.startswith("llm."):
        return _llm_rows(plan)
    part = name.split(".")[3]
    if part in ("context", "key", "value"):
        return q * plan.config.alignment.window_size**2
    return 1 if part == "question_in" else q


def _operations(plan: ExportPlan, block: Block, options: CalibrationOptions) -> float:
    """Return the cost of a block in float32 GEMM operations."""
    passes = 2 * (options.samples + options.held_out)
    total = 0.0
    for linear in _linears(plan, block):
        total += 2 * passes * _rows(plan, linear.name) * linear.size
    for linear in _quantized(plan, block):
        uses_gptq = _uses_gptq(linear, options)
        scales = CLIP_RATIOS[linear.format.bits][2] if uses_gptq else 1
        gemm_passes = ROUNDING_PASSES + (DESCENT_PASSES if uses_gptq else 0)
        total += _attempts(plan, linear) * linear.size * (gemm_passes * linear.inputs + SCALE_OPERATIONS * scales)
    for linear in _observed(plan, block):
        rows, inputs, attempts = _rows(plan, linear.name), linear.inputs, _attempts(plan, linear)
        total += 2 * options.samples * rows * inputs**2
        if _uses_gptq(linear, options):
            total += attempts * 2 * 4 * inputs**3 / 3  # float64 takes twice as long
        if attempts > 1:
            total += (options.samples * rows * COUNT_OPERATIONS + attempts * HISTOGRAM_OPERATIONS) * inputs
    return total


def _sensitivity_operations(plan: ExportPlan, options: CalibrationOptions) -> float:
    """Return the cost of measuring sensitivity: each linear runs all samples from its block to the last one."""
    total, passes = 0.0, 2
    for block in blocks(plan.config):
        passes += len(_measured(plan, block))
        total += passes * sum(2 * _rows(plan, linear.name) * linear.size for linear in _linears(plan, block))
    return total * _sensitivity_samples(options)


def _uses_gptq(linear: Linear, options: CalibrationOptions) -> bool:
    """Return whether GPTQ quantizes a linear; other formats are rounded to nearest."""
    return options.method == "gptq" and linear.format.supports_gptq


def _attempts(plan: ExportPlan, linear: Linear) -> int:
    """Return the number of times a linear is quantized: once, and once for each alpha of SmoothQuant."""
    return 1 if find_producer(linear.name, plan.quantized_formats) is None else 1 + len(ALPHAS)


def _throughput(device: str) -> float:
    """Return the operations per second of a float32 GEMM: the best of three."""
    a = torch.rand(PROBE, PROBE, device=device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - started)
    return 2 * PROBE**3 / min(times)
