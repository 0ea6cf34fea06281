"""``fusion-export --dry-run``: sizes, memory and, for a calibration, what it will take."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fusion_edge.export.calibration.options import CalibrationOptions
from fusion_edge.export.planning.memory import Estimate, estimate
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.runtime.cli import common as cli
from fusion_edge.runtime.errors import FusionError

if TYPE_CHECKING:
    from fusion_edge.export.calibration.estimate import CalibrationEstimate  # needs torch


def dry_run(plan: ExportPlan, calibration: CalibrationOptions | None, fit: int | None, as_json: bool) -> int:
    """Print it. Raises :class:`FusionError` if the bundle does not fit in ``fit`` bytes."""
    sizes = estimate(plan)
    effort = None if calibration is None else _effort(plan, calibration)
    ranges = {} if calibration is None else _ranges(plan)
    fits = None if fit is None else sizes.peak <= fit
    if as_json:
        report = dataclasses.asdict(sizes) | {"peak": sizes.peak, "fits": fits}
        report["formats"] = {name: str(form) for name, form in plan.formats.items()}
        report["calibration"] = None if effort is None else dataclasses.asdict(effort)
        report["ranges"] = ranges
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(_text(plan, sizes, effort, ranges))
    if fit is not None:
        check_fit(sizes, fit)
    if fit is not None and not as_json:
        sys.stdout.write(f"It fits in {cli.size(fit)}, with {cli.size(fit - sizes.peak)} to spare.\n")
    return 0


def check_fit(sizes: Estimate, fit: int) -> None:
    """Raise :class:`FusionError` if a bundle does not run in ``fit`` bytes."""
    if sizes.peak > fit:
        raise FusionError(
            f"It does not fit: the peak is {cli.size(sizes.peak)}, {cli.size(sizes.peak - fit)} more than "
            f"{cli.size(fit)}; try a smaller --max-context, a smaller --query-len, fewer --image-tokens or --int4."
        )


def _effort(plan: ExportPlan, calibration: CalibrationOptions) -> CalibrationEstimate:
    from fusion_edge.export.calibration.driver import check_samples
    from fusion_edge.export.calibration.estimate import estimate_calibration

    options, _ = check_samples(plan, calibration)
    return estimate_calibration(plan, options)


def _ranges(plan: ExportPlan) -> Mapping[str, tuple[float, float]]:
    """The least and the most that --budget and --bits may be, where there are weights for them to share out."""
    from fusion_edge.export.calibration.bit_budget import budget_ranges

    return budget_ranges(plan)


def _text(
    plan: ExportPlan,
    sizes: Estimate,
    effort: CalibrationEstimate | None,
    ranges: Mapping[str, tuple[float, float]],
) -> str:
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
    for option, (least, most) in ranges.items():
        written = f"{least:.3f} to {most:.3f}" if option == "--bits" else f"{cli.size(least)} to {cli.size(most)}"
        rows.append((f"  {option} can be", written))
    return cli.table(rows)
