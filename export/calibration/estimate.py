"""What a calibration will take, told before it starts."""

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
from fusion_edge.quant.smoothquant import ALPHAS, producer
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, MINIMUM_QUESTION

PROCESS_BYTES = 700_000_000  # Python, torch and one sample on its way through a block (measured)
TEXT = 4 * MINIMUM_QUESTION  # positions of a sample's template, question and answer
FLOAT, DOUBLE = 4, 8
SQUARES_AT_ONCE = 4  # of float64, while a linear's hessian are factorized (FactorizedHessian in quant/gptq.py)
REFINING_OPERATIONS = 10  # of a matrix product for every weight and input channel (measured)
ROUNDING_OPERATIONS = 5  # likewise, and for the error that is reported
CANDIDATE_OPERATIONS = 200  # of a matrix product, that take as long as trying one scale for one weight (measured)
COUNT_OPERATIONS = 2000  # likewise, as counting one value of a channel (measured)
GRID_OPERATIONS = 50_000_000  # likewise, as adding up one channel's histogram for a grid (measured)
PROBE = 2048  # side of the product that tells the machine's rate


@dataclass(frozen=True)
class CalibrationEstimate:
    """Of the whole calibration."""

    memory: int
    """Bytes of the process at its peak."""
    disk: int
    """Bytes in the folder beside the output."""
    seconds: float


def estimate_calibration(plan: ExportPlan, options: CalibrationOptions) -> CalibrationEstimate:
    """Formulas in the functions below, rate by a probe of this machine."""
    sequence = blocks(plan.config)
    rate = _rate(options.device)
    return CalibrationEstimate(
        memory=PROCESS_BYTES + max(_memory(plan, block, options) for block in sequence),
        disk=calibration_disk(plan, options),
        seconds=(sum(_operations(plan, block, options) for block in sequence) + _trials(plan, options)) / rate,
    )


def calibration_disk(plan: ExportPlan, options: CalibrationOptions) -> int:
    """Bytes: states of all samples before and behind a block, those held out twice, and the finished weights."""
    sequence = blocks(plan.config)
    states = max(_state_bytes(plan, block) for block in sequence)
    records = sum(_linears_bytes(plan, block) for block in sequence)
    return 2 * (options.samples + 2 * options.held_out) * states + records


def _linears(plan: ExportPlan, block: Block) -> list[Linear]:
    found = [linear for linear in plan.linears.values() if not linear.is_table]
    return [linear for linear in found if linear.weight.name.startswith(block.prefixes)]


def _quantized(plan: ExportPlan, block: Block) -> list[Linear]:
    """Linears that calibration quantizes."""
    return [linear for linear in _linears(plan, block) if linear.is_quantized_here]


def _observed(plan: ExportPlan, block: Block) -> list[Linear]:
    """Linears whose inputs' hessian are kept; ``up`` of the LLM shares those of ``gate``."""
    return [p for p in _quantized(plan, block) if not (p.name.startswith("llm.") and p.name.endswith("mlp.up"))]


def _memory(plan: ExportPlan, block: Block, options: CalibrationOptions) -> int:
    """Weights, hessian and what factorizing the largest needs; or both sets of weights while samples pass."""
    weights = FLOAT * sum(p.size for p in _linears(plan, block))
    squares = [p.inputs for p in _observed(plan, block)]
    fitting = weights + DOUBLE * (sum(n * n for n in squares) + SQUARES_AT_ONCE * max(squares, default=0) ** 2)
    return max(fitting, 2 * weights + _trial_bytes(plan, block, options))


def _trial_bytes(plan: ExportPlan, block: Block, options: CalibrationOptions) -> int:
    """States of the samples on which sensitivity is measured: the float model's, and each trial's before and behind a
    block. Trials share the windows.
    """
    trials = 2 * len(_tried(plan, block)) * _positions(plan) * plan.config.language.hidden_size
    return _trial_samples(options) * (_state_bytes(plan, block) + FLOAT * trials)


def _tried(plan: ExportPlan, block: Block) -> list[Linear]:
    """Linears whose sensitivity may be measured."""
    names = candidates(plan)
    return [linear for linear in _linears(plan, block) if linear.name in names]


def _trial_samples(options: CalibrationOptions) -> int:
    """On how many samples sensitivity is measured."""
    return min(options.sensitivity_samples or SENSITIVITY_SAMPLES, options.samples) if options.is_mixed else 0


def _state_bytes(plan: ExportPlan, block: Block) -> int:
    """What one sample leaves behind a block."""
    config = plan.config
    if block.name.startswith("vision."):
        return FLOAT * 3 * _vision_rows(plan) * config.vision.width
    windows = plan.options.query_lengths[0] * config.alignment.window_size**2
    return FLOAT * (_positions(plan) + windows) * config.language.hidden_size


def _linears_bytes(plan: ExportPlan, block: Block) -> int:
    return sum(p.size * p.format.bits // 8 for p in _quantized(plan, block))


def _vision_rows(plan: ExportPlan) -> int:
    return (GLOBAL_CROPS + 1) * plan.config.vision.patches + MINIMUM_QUESTION


def _positions(plan: ExportPlan) -> int:
    return plan.options.image_tokens + plan.options.query_lengths[0] + TEXT


def _rows(plan: ExportPlan, name: str) -> int:
    """Rows of a linear's input for one sample."""
    q = plan.options.query_lengths[0]
    if name.startswith("vision.text_projector"):
        return MINIMUM_QUESTION
    if name.startswith("vision."):
        return _vision_rows(plan)
    if name.startswith("llm.lm_head"):
        return TEXT // 2
    if name.startswith("llm."):
        return _positions(plan)
    part = name.split(".")[3]
    if part in ("context", "key", "value"):
        return q * plan.config.alignment.window_size**2
    return 1 if part == "question_in" else q


def _operations(plan: ExportPlan, block: Block, options: CalibrationOptions) -> float:
    """Of float32 products, or what takes as long."""
    passes = 2 * (options.samples + options.held_out)
    total = 0.0
    for p in _linears(plan, block):
        total += 2 * passes * _rows(plan, p.name) * p.size
    for p in _quantized(plan, block):
        is_solved = _is_solved(p, options)
        scales = CLIP_RATIOS[p.format.bits][2] if is_solved else 1
        products = ROUNDING_OPERATIONS + (REFINING_OPERATIONS if is_solved else 0)
        total += _fits(plan, p) * p.size * (products * p.inputs + CANDIDATE_OPERATIONS * scales)
    for p in _observed(plan, block):
        rows, inputs, fits = _rows(plan, p.name), p.inputs, _fits(plan, p)
        total += 2 * options.samples * rows * inputs**2
        if _is_solved(p, options):
            total += fits * 2 * 4 * inputs**3 / 3  # float64 takes twice as long
        if fits > 1:
            total += (options.samples * rows * COUNT_OPERATIONS + fits * GRID_OPERATIONS) * inputs
    return total


def _trials(plan: ExportPlan, options: CalibrationOptions) -> float:
    """Operations that measuring every linear's sensitivity takes: from its block to the end, on every sample."""
    total, passes = 0.0, 2
    for block in blocks(plan.config):
        passes += len(_tried(plan, block))
        total += passes * sum(2 * _rows(plan, p.name) * p.size for p in _linears(plan, block))
    return total * _trial_samples(options)


def _is_solved(linear: Linear, options: CalibrationOptions) -> bool:
    """Whether GPTQ fits a linear; codebooks are rounded to nearest."""
    return options.method == "gptq" and not linear.format.has_codebook


def _fits(plan: ExportPlan, linear: Linear) -> int:
    """How many times a linear is quantized: once, or with each equalisation of its inputs."""
    return 1 if producer(linear.name, plan.quantized_formats) is None else 1 + len(ALPHAS)


def _rate(device: str) -> float:
    """Operations a second of a float32 product: the best of three."""
    a = torch.rand(PROBE, PROBE, device=device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - started)
    return 2 * PROBE**3 / min(times)
