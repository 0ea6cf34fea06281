"""``fusion-export --dry-run``: sizes, memory and, for a calibration, what it will take."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from fusion_edge.export.memory import Estimate, estimate
from fusion_edge.export.plan import ExportPlan
from fusion_edge.quant.calibration.options import CalibrationOptions
from fusion_edge.runtime import cli
from fusion_edge.runtime.errors import FusionError

if TYPE_CHECKING:
    from fusion_edge.quant.calibration.estimate import CalibrationEstimate  # needs torch


def dry_run(plan: ExportPlan, calibration: CalibrationOptions | None, fit: int | None, as_json: bool) -> int:
    """Print it. Raises :class:`FusionError` if the bundle does not fit in ``fit`` bytes."""
    sizes = estimate(plan)
    effort = None if calibration is None else _effort(plan, calibration)
    fits = None if fit is None else sizes.peak <= fit
    if as_json:
        report = dataclasses.asdict(sizes) | {"peak": sizes.peak, "fits": fits}
        report["formats"] = {name: str(form) for name, form in plan.formats.items()}
        report["calibration"] = None if effort is None else dataclasses.asdict(effort)
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(_text(plan, sizes, effort))
    if fit is not None and not fits:
        raise FusionError(
            f"It does not fit: the peak is {cli.size(sizes.peak)}, {cli.size(sizes.peak - fit)} more than "
            f"{cli.size(fit)}; try a smaller --max-context, a smaller --query-len or --int4."
        )
    if fit is not None and not as_json:
        sys.stdout.write(f"It fits in {cli.size(fit)}, with {cli.size(fit - sizes.peak)} to spare.\n")
    return 0


def _effort(plan: ExportPlan, calibration: CalibrationOptions) -> CalibrationEstimate:
    from fusion_edge.quant.calibration.estimate import estimate_calibration
    from fusion_edge.quant.calibration.export import checked

    options, _ = checked(plan, calibration)
    return estimate_calibration(plan, options)


def _text(plan: ExportPlan, sizes: Estimate, effort: CalibrationEstimate | None) -> str:
    rows = [("On disk", ""), *((f"  {name}", cli.size(count)) for name, count in sizes.graphs.items())]
    rows += [
        ("  bundle", cli.size(sizes.bundle)),
        ("In memory", ""),
        ("  weights", cli.size(sizes.weights)),
        (f"  KV cache, {plan.settings.max_context} positions", cli.size(sizes.key_value_cache)),
        (f"  alignment of one image, {plan.options.query_lengths[0]} latents", cli.size(sizes.alignment_cache)),
        ("  activations", cli.size(sizes.activations)),
        ("  peak", cli.size(sizes.peak)),
    ]
    if effort is not None:
        rows += [
            ("Calibration", ""),
            ("  memory", cli.size(effort.memory)),
            ("  disk, for as long as it runs", cli.size(effort.disk)),
            ("  time", f"{effort.seconds / 60:.0f} min"),
        ]
    return cli.table(rows)
