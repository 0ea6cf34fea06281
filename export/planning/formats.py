"""Format of every weight: from rules, or from a prequantized checkpoint, checked against shapes and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusion_edge.export.checkpoint.prequantized.layout import StoredLayout
from fusion_edge.export.checkpoint.prequantized_weights import check_scales, stored_layout
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.resolved_options import ResolvedOptions
from fusion_edge.export.planning.rules import LM_HEAD, Rule, assign, precision_rules
from fusion_edge.runtime.errors import UsageError

FLOAT_KINDS = {"fp8": "int8", "nvfp4": "int4"}
"""Kinds that not all targets support, with an integer format of as many bits."""


def plan_linears(
    checkpoint: Checkpoint, parameters: Mapping[str, Parameter], options: ResolvedOptions
) -> dict[str, Linear]:
    """Return every linear and the token table by name, in the order of ``parameters``.

    Raises :class:`UsageError` for rules and formats that cannot be met, :class:`FusionError` for a prequantized weight
    that a bundle cannot store.
    """
    target, requested = options.target, options.requested
    weights = {parameter.linear: parameter for parameter in parameters.values() if parameter.kind != "float"}
    layouts = _prequantized(checkpoint, weights, requested.rules)
    for name in layouts:
        check_scales(weights[name], checkpoint, options.activations)
    layouts = {name: target.stored_layout(layout, weights[name].shape[1]) for name, layout in layouts.items()}
    int8 = target.int8_format(requested.group_size)
    lm_head = target.lm_head_format(weights[LM_HEAD].shape, requested.group_size, requested.is_small)
    defaults = precision_rules(
        options.precision, requested.group_size, options.vision, requested.asymmetric, int8, lm_head
    )
    formats = assign(weights, requested.rules, defaults) | {name: layout.format for name, layout in layouts.items()}
    linears = {name: Linear(weights[name], fmt, layouts.get(name)) for name, fmt in formats.items()}
    _check_codebooks(linears)
    _check_float_kinds(linears, options)
    _check_quantized_activations(linears, options)
    target.check_formats(linears)
    return linears


def _prequantized(
    checkpoint: Checkpoint, weights: Mapping[str, Parameter], overrides: Sequence[Rule]
) -> dict[str, StoredLayout]:
    """Return the stored layouts of prequantized linears. A rule that matches a linear quantizes it anew.

    Raises as :func:`stored_layout`.
    """
    return {
        name: stored_layout(weight, checkpoint)
        for name, weight in weights.items()
        if weight.is_prequantized and not any(rule.matches(name) for rule in overrides)
    }


def _check_codebooks(linears: Mapping[str, Linear]) -> None:
    for name, linear in linears.items():
        fmt = linear.format
        if fmt.has_codebook and linear.inputs % fmt.group_size:
            raise UsageError(
                f"{name} cannot be {fmt}: its {linear.inputs} inputs are not whole blocks of {fmt.group_size}; use a "
                f"smaller --group-size, or another format (--rule '{name}=int4')."
            )


def _check_float_kinds(linears: Mapping[str, Linear], options: ResolvedOptions) -> None:
    for name, linear in linears.items():
        kind = linear.format.kind
        if kind in FLOAT_KINDS and kind not in options.target.float_kinds:
            raise UsageError(
                f"{kind} ({name}) does not run on --target {options.target.name}; use {FLOAT_KINDS[kind]}, or "
                "--target tensorrt."
            )


def _check_quantized_activations(linears: Mapping[str, Linear], options: ResolvedOptions) -> None:
    first = next((name for name, linear in linears.items() if linear.format.quantizes_activations), None)
    if first is None:
        return
    if not options.requested.is_calibrated:
        kind = linears[first].format.kind
        other = "int4" if kind == "nvfp4" else f"--vision {options.target.default_vision}"
        raise UsageError(
            f"{first} is {kind}, which needs samples for the range of its activations: add --calibrate DATA, or use "
            f"{other}."
        )
    if not options.target.quantizes_activations:
        raise UsageError(
            f"w8a8 ({first}) does not run on --target {options.target.name}; use int8 (--vision int8-weights) or fp16."
        )
