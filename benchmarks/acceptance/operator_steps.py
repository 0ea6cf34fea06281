"""Steps that build an engine of one operator and compare it with float64. Without a GPU they only build."""

from __future__ import annotations

import importlib
from typing import Any

from fusion_edge.benchmarks.acceptance import operators, quantized_linears
from fusion_edge.benchmarks.acceptance.alignment import WIDTH, kernel_source
from fusion_edge.benchmarks.acceptance.device import NoCuda
from fusion_edge.benchmarks.acceptance.engine import (
    BuiltEngine,
    EngineRun,
    Layers,
    OperatorCase,
    Target,
    build,
    find_target,
    run,
    writes_tensor_of,
)
from fusion_edge.benchmarks.acceptance.steps import Outcome, SkippedStep, Workspace
from fusion_edge.benchmarks.latency.peaks import copy_bandwidth
from fusion_edge.export.engines.decompositions import (
    SINCE,
    allow_decomposition,
    decompose_operators,
    unsupported_operators,
    use_attention,
)
from fusion_edge.export.engines.nvfp4 import use_fp4
from fusion_edge.export.planning.targets.tensorrt import FORMATS_SINCE
from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.runtime.errors import FusionError

PROMPT = 256
MOST_BITS = 1.5
"""Bits of an engine for a weight over those of its format, at most, if it stores the quantized ones and scales."""


def linear(workspace: Workspace, form: str) -> Outcome:
    """Check a quantized linear layer: one row, as in a decode step, then many.

    Figures: whether a layer writes the dequantized weights, and the rate at which one row reads the stored ones.
    """
    target, fmt = find_target(), quantized_linears.FORMS[form].format
    since = FORMATS_SINCE.get(fmt.kind)
    if since is not None and target.capability < tuple(map(int, since.split("."))):
        raise SkippedStep(
            f"Compute capability {target.compute_capability} has no {fmt.kind.upper()}; {since} and later have."
        )
    figures: dict[str, Any] = {}
    inputs, outputs = quantized_linears.INPUTS, quantized_linears.OUTPUTS
    weights = inputs * outputs
    for rows in (1, PROMPT):
        label = f"{form} {rows} rows"
        case = _supported(target, quantized_linears.quantized_linear(form, rows, inputs, outputs))
        use_fp4(case.model)
        built = build(target, case)
        ran = _run(target, built, case, label, workspace)
        layers = built.layers if ran is None else ran.layers
        figures[label] = _figures(layers, ran) | {
            "plan_bits_a_weight": 8 * len(built.plan) / weights,
            "writes_dequantized_weights": writes_tensor_of(layers, weights),
        }
    one, many = figures.values()
    fusion = _fusion(one["writes_dequantized_weights"], one["plan_bits_a_weight"] / fmt.bits)
    if isinstance(target.cuda, NoCuda):
        return _built(target, fusion, figures)
    rate, figures["copy_bandwidth"] = weights * fmt.bits / 8 / one["seconds"], copy_bandwidth(target.cuda)
    figures["weight_bytes_a_second"], figures["flops"] = rate, 2 * weights * PROMPT / many["seconds"]
    share = f"one row {rate / figures['copy_bandwidth']:.0%} of a copy's bandwidth"
    return Outcome(f"{fusion}; {share}; {PROMPT} rows {figures['flops'] / 1e12:.1f} TFLOP/s", figures)


def _fusion(writes_dequantized_weights: bool | None, bits: float) -> str:
    """Return how an engine has the weights. ``bits``: those of the engine for a weight over the quantized ones."""
    if writes_dequantized_weights:
        return "dequantized before the GEMM"
    if bits > MOST_BITS:  # no layer dequantizes them, because the builder has
        return "stored dequantized"
    return "fusion unknown" if writes_dequantized_weights is None else "fused"


def attention(workspace: Workspace, dim: int) -> Outcome:
    """Check attention with one head size: a prompt and a decode step. Says whether there is a fused kernel."""
    target = find_target()
    figures: dict[str, Any] = {}
    for name, rows, length in (("prompt", 512, 512), ("decode", 1, operators.CAPACITY)):
        case = _supported(target, operators.attention(dim, rows, length))
        try:
            built, refusal = build(target, case), None
        except FusionError as error:
            refusal = str(error)
            allow_decomposition(case.model)  # as fusion-build does at once
            built = build(target, case)
        ran = _run(target, built, case, f"attention-{dim} {name}", workspace)
        figures[name] = _figures(built.layers if ran is None else ran.layers, ran) | {
            "refusal_as_one_layer": refusal,
            "is_decomposed": refusal is not None or "Attention" in _unsupported(target),
        }
    kinds = (f"{name} {'decomposed' if one['is_decomposed'] else 'one layer'}" for name, one in figures.items())
    summary = ", ".join(kinds)
    if isinstance(target.cuda, NoCuda):
        return _built(target, summary, figures)
    times = ", ".join(f"{1e6 * one['seconds']:.0f} us" for one in figures.values())
    return Outcome(f"{summary}; {times}", figures)


def int8_cache(workspace: Workspace, dim: int) -> Outcome:
    """Check attention to an int8 KV cache that engines only read: a prompt behind a prefix, and decode steps.

    The second one has equal shares of small values.

    Decode steps have as many tokens as that of :func:`attention`, whose cache is float16.
    """
    target = find_target()
    figures: dict[str, Any] = {}
    step = 1, operators.CAPACITY - 1
    for name, rows, before in (("prompt", 256, 256), ("decode", *step), ("decode-flat", *step)):
        case = operators.quantized_kv_cache(rows, before, dim=dim, is_flat=name == "decode-flat")
        use_attention(case.model)
        case = _supported(target, case)
        allow_decomposition(case.model)
        built = build(target, case)
        ran = _run(target, built, case, f"int8-cache-{dim} {name}", workspace)
        figures[name] = _figures(built.layers if ran is None else ran.layers, ran)
    layers = ", ".join(f"{name} {len(one['layers'])} layers" for name, one in figures.items())
    if isinstance(target.cuda, NoCuda):
        return _built(target, layers, figures)
    times = ", ".join(f"{1e6 * one['seconds']:.0f} us" for one in figures.values())
    return Outcome(f"{layers}; {times}", figures)


def scatter(workspace: Workspace, is_native: bool) -> Outcome:
    """Check the update of a KV cache whose input and output share memory: TensorScatter, or its decomposition."""
    target = find_target()
    case = operators.tensor_scatter()
    if not is_native:
        decompose_operators(case.model, list(SINCE), 1)
    elif "TensorScatter" in _unsupported(target):
        raise SkippedStep(f"TensorRT {target.library.version} has no TensorScatter; step scatter-alias counts there.")
    built = build(target, case)
    if isinstance(target.cuda, NoCuda):
        return _built(target, f"{len(built.layers)} layers", _figures(built.layers, None))
    ran = run(target, built.plan, case, "tensor-scatter" if is_native else "scatter-alias", workspace)
    cache = case.inputs["past"].nbytes
    return Outcome(f"{1e6 * ran.seconds:.1f} us; the cache has {cache / 1e6:.1f} MB", _figures(ran.layers, ran))


def plugin(workspace: Workspace, operator: str, questions: int, latents: int) -> Outcome:
    """Check a plugin with a number of rows."""
    target = find_target()
    architecture = target.compute_capability.replace(".", "")
    trt = target.library.module
    if reason := tensorrt_plugins.unsupported_reason(trt, architecture, workspace.kernels is not None):
        raise SkippedStep(f"{reason}.")
    if isinstance(target.cuda, NoCuda):
        raise SkippedStep(str(target.cuda))
    module = importlib.import_module(f"{target.library.name}.plugin")
    tensorrt_plugins.register(module, architecture, kernel_source(workspace, architecture))
    one = next(plugin for plugin in PLUGINS if plugin.operator == operator)
    case = operators.plugin(one, questions, latents, WIDTH)
    ran = run(target, build(target, case).plan, case, f"{operator} {questions * latents} rows", workspace)
    return Outcome(f"largest error {ran.largest_error:.1e}, {1e6 * ran.seconds:.1f} us", _figures(ran.layers, ran))


def _run(target: Target, built: BuiltEngine, case: OperatorCase, label: str, workspace: Workspace) -> EngineRun | None:
    """Run an engine and compare its outputs; None without CUDA."""
    return None if isinstance(target.cuda, NoCuda) else run(target, built.plan, case, label, workspace)


def _unsupported(target: Target) -> list[str]:
    return [] if target.library.is_rtx else unsupported_operators(target.library.version_numbers)


def _supported(target: Target, case: OperatorCase) -> OperatorCase:
    """Decompose what this TensorRT does not know, as ``fusion-build`` does."""
    if names := _unsupported(target):
        decompose_operators(case.model, names, 1)
    return case


def _figures(layers: Layers, ran: EngineRun | None) -> dict[str, Any]:
    measured = {} if ran is None else {"largest_error": ran.largest_error, "seconds": ran.seconds}
    return {"layers": [layer["Name"] for layer in layers], **measured}


def _built(target: Target, summary: str, figures: dict[str, Any]) -> Outcome:
    built = f"built with {target.library.name} {target.library.version} for {target.compute_capability}"
    return Outcome(f"{summary}; {built}, not run. {target.cuda}", figures)
