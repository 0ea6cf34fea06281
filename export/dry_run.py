"""``fusion-export --dry-run``: size, memory and, with ``--calibrate``, the cost of calibration."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fusion_edge.export.calibration.options import CalibrationOptions
from fusion_edge.export.planning.memory import Estimate, estimate
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.export.planning.targets.tensorrt import TENSORRT
from fusion_edge.export.planning.traffic import Traffic, decode_steps, vision_run
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes, format_table

if TYPE_CHECKING:
    from fusion_edge.export.calibration.estimate import CalibrationEstimate  # needs torch


def dry_run(plan: ExportPlan, calibration: CalibrationOptions | None, fit: int | None, as_json: bool) -> int:
    """Print the estimates of a planned export. Returns the exit code.

    Raises :class:`FusionError` if the bundle does not run in ``fit`` bytes of memory.
    """
    sizes = estimate(plan)
    cost = None if calibration is None else _calibration_cost(plan, calibration)
    ranges = {} if calibration is None else _budget_ranges(plan)
    fits = None if fit is None else sizes.peak <= fit
    if as_json:
        report = dataclasses.asdict(sizes) | {"peak": sizes.peak, "fits": fits}
        report["formats"] = {name: str(fmt) for name, fmt in plan.formats.items()}
        report["calibration"] = None if cost is None else dataclasses.asdict(cost)
        report["ranges"] = ranges
        report["traffic"] = {name: dataclasses.asdict(run) for name, run in _traffic(plan).items()}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(_text(plan, sizes, cost, ranges))
    if fit is not None:
        check_fit(sizes, fit)
    if fit is not None and not as_json:
        sys.stdout.write(f"It fits in {format_bytes(fit)}, with {format_bytes(fit - sizes.peak)} to spare.\n")
    return 0


def check_fit(sizes: Estimate, fit: int) -> None:
    """Raise :class:`FusionError` if a bundle does not run in ``fit`` bytes of memory."""
    if sizes.peak > fit:
        raise FusionError(
            f"It does not fit: the peak is {format_bytes(sizes.peak)}, {format_bytes(sizes.peak - fit)} more than "
            f"{format_bytes(fit)}; try a smaller --max-context, a smaller --query-len, fewer --image-tokens, --int4 "
            "or 8-bit vision (--calibrate DATA)."
        )


def _calibration_cost(plan: ExportPlan, calibration: CalibrationOptions) -> CalibrationEstimate:
    from fusion_edge.export.calibration.driver import check_samples
    from fusion_edge.export.calibration.estimate import estimate_calibration

    options, _ = check_samples(plan, calibration)
    return estimate_calibration(plan, options)


def _budget_ranges(plan: ExportPlan) -> Mapping[str, tuple[float, float]]:
    """Return the smallest and largest useful values of --budget and --bits; empty without 4-bit weights."""
    from fusion_edge.export.calibration.bit_budget import budget_ranges

    return budget_ranges(plan)


def _text(
    plan: ExportPlan,
    sizes: Estimate,
    cost: CalibrationEstimate | None,
    ranges: Mapping[str, tuple[float, float]],
) -> str:
    rows = [("On disk", ""), *((f"  {name}", format_bytes(count)) for name, count in sizes.graphs.items())]
    rows += [
        ("  bundle", format_bytes(sizes.bundle)),
        ("In memory", ""),
        ("  weights", format_bytes(sizes.weights)),
        (f"  KV cache, {plan.options.max_context} tokens", format_bytes(sizes.key_value_cache)),
        (f"  a cached image, {plan.options.query_lengths[0]} latents", format_bytes(sizes.cached_image)),
        ("  activations", format_bytes(sizes.activations)),
        ("  peak", format_bytes(sizes.peak)),
        ("  KV cache of a scene, in addition", format_bytes(sizes.scene_prefix)),
    ]
    rows += _traffic_rows(plan)
    if cost is not None:
        rows += [
            ("Calibration", ""),
            ("  memory", format_bytes(cost.memory)),
            ("  disk, temporarily", format_bytes(cost.disk)),
            ("  time", f"{cost.seconds / 60:.0f} min"),
        ]
    for option, (least, most) in ranges.items():
        written = (
            f"{least:.3f} to {most:.3f}" if option == "--bits" else f"{format_bytes(least)} to {format_bytes(most)}"
        )
        rows.append((f"  {option} can be", written))
    return format_table(rows)


def _traffic(plan: ExportPlan) -> dict[str, Traffic]:
    """Return the traffic of each kind of run on TensorRT; empty for other targets."""
    if plan.options.target is not TENSORRT:
        return {}
    steps = {f"decode step, up to {window} tokens": step for window, step in decode_steps(plan).items()}
    return {"vision encoder, weights": vision_run(plan)} | steps


def _traffic_rows(plan: ExportPlan) -> list[tuple[str, str]]:
    """Return the lines about bytes that runs move, twice where TensorRT may not fuse 8-bit weights."""
    rows = [("Moved, at least", "")] if plan.options.target is TENSORRT else []
    for name, run in _traffic(plan).items():
        rows.append((f"  {name}", _moved(run.fused, plan)))
        if run.unfused > run.fused:
            rows.append(("    if 8-bit weights are dequantized first", _moved(run.unfused, plan)))
    return rows


def _moved(count: int, plan: ExportPlan) -> str:
    """Format bytes with their time at the device's bandwidth."""
    bandwidth = plan.options.bandwidth
    return format_bytes(count) + ("" if bandwidth is None else f", {1000 * count / bandwidth:.1f} ms")
