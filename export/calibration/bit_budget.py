"""``--budget`` and ``--bits``: a plan in which the most sensitive of the 4-bit linears have 8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fusion_edge.export.calibration.options import SENSITIVITY_SAMPLES, CalibrationOptions
from fusion_edge.export.calibration.samples import Samples
from fusion_edge.export.calibration.sensitivity import measure_sensitivity
from fusion_edge.export.planning.plan import ExportPlan, plan_export
from fusion_edge.quant.bit_allocation import Promotion, allocate, mean_bits, stored_bits
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.policy import Rule
from fusion_edge.runtime.bundle.graph_validation import PAGE
from fusion_edge.runtime.bundle.quantization_report import BitAllocation
from fusion_edge.runtime.errors import UsageError

REPORT_BYTES, REPORT_BYTES_A_LINEAR = 4096, 300  # at most, of what quantization.json tells beyond the plan's estimate


def candidates(plan: ExportPlan) -> dict[str, tuple[int, int]]:
    """Shapes ``[outputs, inputs]`` of the 4-bit linears that no rule of the user names."""
    found = {}
    for name, linear in plan.linears.items():
        asked = any(rule.matches(name) for rule in plan.options.requested.rules)
        if linear.is_quantized_here and linear.format.bits == 4 and not linear.is_table and not asked:
            found[name] = linear.outputs, linear.inputs
    return found


def check_budget(plan: ExportPlan, options: CalibrationOptions) -> None:
    """Raise :class:`UsageError` for a budget that cannot be met, or that there is nothing to share out in."""
    option = "--budget" if options.budget is not None else "--bits"
    if not options.is_mixed:
        if options.sensitivity_samples is not None:
            raise UsageError("--sensitivity-samples only works with --budget or --bits; add one.")
        return
    if not candidates(plan):
        raise UsageError(
            f"{option} shares out 8 bits among 4-bit weights, and this export chooses none: use --int4 and fewer "
            f"rules, or leave {option} out."
        )
    if _spare_bytes(plan, options) < 0:
        smallest = f"{_least_bits(plan):.3f}" if options.budget is None else f"{_least_bytes(plan)} bytes"
        asked = f"{options.bits:g}" if options.budget is None else f"{options.budget} bytes"
        raise UsageError(
            f"{option} of {asked} cannot be met: with 4 bits for every weight that may have them it takes {smallest}, "
            "the smallest there is; raise it, or use a larger --group-size."
        )


def mix(
    plan: ExportPlan, options: CalibrationOptions, samples: Samples, folder: Path
) -> tuple[ExportPlan, BitAllocation]:
    """The plan that keeps to the budget, and what decided it. Raises as :func:`check_budget`."""
    check_budget(plan, options)
    shapes = candidates(plan)
    used = samples.calibrating[: options.sensitivity_samples or SENSITIVITY_SAMPLES]
    sensitivities = measure_sensitivity(plan, list(shapes), used, options.device, folder)
    page = PAGE if options.budget is not None else 1
    offers = [Promotion(s, _extra_bytes(shapes[s.name], s.name, plan, page)) for s in sensitivities]
    raised = allocate(offers, _spare_bytes(plan, options))
    rules = tuple(Rule(name, _raised(plan.linears[name].format, plan)) for name in raised)
    mixed = plan_export(plan.checkpoint, replace(plan.options.requested, rules=plan.options.requested.rules + rules))
    bits = round(mean_bits(shapes, mixed.formats), 4)
    return mixed, BitAllocation(bits, len(used), tuple(raised), tuple(sensitivities))


def ranges(plan: ExportPlan) -> dict[str, tuple[float, float]]:
    """The least and the most that ``--budget`` (bytes) and ``--bits`` may be; nothing without 4-bit weights."""
    shapes = candidates(plan)
    if not shapes:
        return {}
    most = mean_bits(shapes, {name: _raised(plan.linears[name].format, plan) for name in shapes})
    extra = sum(_extra_bytes(shape, name, plan, PAGE) for name, shape in shapes.items())
    least = _least_bytes(plan)
    return {"--budget": (least, least + extra), "--bits": (_least_bits(plan), most)}


def _raised(form: WeightFormat, plan: ExportPlan) -> WeightFormat:
    return plan.options.target.int8_format(form.group_size)


def _extra_bytes(shape: tuple[int, int], name: str, plan: ExportPlan, page: int) -> int:
    """Rounded up to pages: tensors begin at one, so no more than this is added to the file."""
    form = plan.linears[name].format
    more = (stored_bits(shape, _raised(form, plan)) - stored_bits(shape, form)) // 8
    return -(-more // page) * page


def _least_bits(plan: ExportPlan) -> float:
    return mean_bits(candidates(plan), plan.formats)


def _least_bytes(plan: ExportPlan) -> int:
    return plan.bundle_bytes + REPORT_BYTES + REPORT_BYTES_A_LINEAR * len(plan.linears)


def _spare_bytes(plan: ExportPlan, options: CalibrationOptions) -> int:
    """What the budget leaves for 8 bits; negative if it cannot be met."""
    if options.budget is not None:
        return options.budget - _least_bytes(plan)
    assert options.bits is not None
    weights = sum(rows * inputs for rows, inputs in candidates(plan).values())
    spare = (options.bits - _least_bits(plan)) * weights / 8
    return int(spare) if spare >= 0 else -1
