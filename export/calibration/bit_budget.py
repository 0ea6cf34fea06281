"""``--budget`` and ``--bits``: rules that promote the most sensitive 4-bit linears to 8 bits."""

from __future__ import annotations

from pathlib import Path

from fusion_edge.export.calibration.options import SENSITIVITY_SAMPLES, CalibrationOptions
from fusion_edge.export.calibration.samples import Samples
from fusion_edge.export.calibration.sensitivity import measure_sensitivity
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.export.planning.rules import Rule
from fusion_edge.quant.bit_allocation import Promotion, allocate, mean_bits, stored_bits
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.bundle.graph_validation import PAGE
from fusion_edge.runtime.bundle.quantization_report import BitAllocation
from fusion_edge.runtime.errors import UsageError

REPORT_BYTES, REPORT_BYTES_PER_LINEAR = 4096, 300  # upper bound of quantization.json beyond the plan's estimate


def candidates(plan: ExportPlan) -> dict[str, tuple[int, int]]:
    """Return the 4-bit linears that no rule of the user matches: shape ``[outputs, inputs]`` by name."""
    found = {}
    for name, linear in plan.linears.items():
        is_ruled = any(rule.matches(name) for rule in plan.options.requested.rules)
        if linear.is_quantized_here and linear.format.bits == 4 and not linear.is_table and not is_ruled:
            found[name] = linear.outputs, linear.inputs
    return found


def check_budget(plan: ExportPlan, options: CalibrationOptions) -> None:
    """Raise :class:`UsageError` for a budget that is too small, or without 4-bit linears to promote."""
    option = "--budget" if options.budget is not None else "--bits"
    if not options.has_budget:
        if options.sensitivity_samples is not None:
            raise UsageError("--sensitivity-samples only works with --budget or --bits; add one.")
        return
    if not candidates(plan):
        raise UsageError(
            f"{option} promotes 4-bit weights to 8 bits, and this export has none to promote; use --int4 and fewer "
            f"rules, or leave {option} out."
        )
    if _spare_bytes(plan, options) < 0:
        minimum = f"{_minimum_bits(plan):.3f}" if options.budget is None else f"{_minimum_bytes(plan)} bytes"
        raise UsageError(f"{option} is too small: the minimum is {minimum}. Raise it, or use a larger --group-size.")


def allocate_bits(
    plan: ExportPlan, options: CalibrationOptions, samples: Samples, folder: Path
) -> tuple[tuple[Rule, ...], BitAllocation]:
    """Return the rules that promote linears within the budget, and the report. Raises as :func:`check_budget`.

    Measures the sensitivity of every candidate. Resumes from the files in ``folder``.
    """
    check_budget(plan, options)
    shapes = candidates(plan)
    used = samples.calibrating[: options.sensitivity_samples or SENSITIVITY_SAMPLES]
    sensitivities = measure_sensitivity(plan, list(shapes), used, options.device, folder)
    page = PAGE if options.budget is not None else 1
    promotions = [Promotion(s, _extra_bytes(plan, s.name, page)) for s in sensitivities]
    promoted = allocate(promotions, _spare_bytes(plan, options))
    formats = {name: _promoted(plan, name) for name in promoted}
    bits = round(mean_bits(shapes, plan.formats | formats), 4)
    rules = tuple(Rule(name, fmt) for name, fmt in formats.items())
    return rules, BitAllocation(bits, len(used), tuple(promoted), tuple(sensitivities))


def budget_ranges(plan: ExportPlan) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest useful ``--budget`` (bytes) and ``--bits``; empty without 4-bit weights."""
    shapes = candidates(plan)
    if not shapes:
        return {}
    maximum = mean_bits(shapes, {name: _promoted(plan, name) for name in shapes})
    extra = sum(_extra_bytes(plan, name, PAGE) for name in shapes)
    minimum = _minimum_bytes(plan)
    return {"--budget": (minimum, minimum + extra), "--bits": (_minimum_bits(plan), maximum)}


def _promoted(plan: ExportPlan, name: str) -> WeightFormat:
    return plan.options.target.int8_format(plan.linears[name].format.group_size)


def _extra_bytes(plan: ExportPlan, name: str, page: int) -> int:
    """Return the bytes that 8 bits add, rounded up to pages: an upper bound, since tensors start at page boundaries."""
    linear = plan.linears[name]
    shape = linear.outputs, linear.inputs
    more = (stored_bits(shape, _promoted(plan, name)) - stored_bits(shape, linear.format)) // 8
    return -(-more // page) * page


def _minimum_bits(plan: ExportPlan) -> float:
    return mean_bits(candidates(plan), plan.formats)


def _minimum_bytes(plan: ExportPlan) -> int:
    return plan.bundle_bytes + REPORT_BYTES + REPORT_BYTES_PER_LINEAR * len(plan.linears)


def _spare_bytes(plan: ExportPlan, options: CalibrationOptions) -> int:
    """Return the bytes that the budget leaves for 8 bits; negative if it is too small."""
    if options.budget is not None:
        return options.budget - _minimum_bytes(plan)
    assert options.bits is not None
    weights = sum(outputs * inputs for outputs, inputs in candidates(plan).values())
    spare = (options.bits - _minimum_bits(plan)) * weights / 8
    return int(spare) if spare >= 0 else -1
