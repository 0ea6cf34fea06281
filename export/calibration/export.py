"""A calibrated export: samples, calibration, the check of what it cost, the bundle."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fusion_edge.export.bundle.hidden_folders import hidden_parent
from fusion_edge.export.bundle.writer import check_output, resolve_output, write_bundle
from fusion_edge.export.calibration.bit_budget import check_budget, mix
from fusion_edge.export.calibration.estimate import calibration_disk
from fusion_edge.export.calibration.options import CalibrationOptions
from fusion_edge.export.calibration.run import calibrate
from fusion_edge.export.calibration.samples import Samples, read_samples
from fusion_edge.export.calibration.work_folder import describe, folder_bytes, work_folder
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.runtime.bundle import manifest as bundle
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory, usable_processors

NAMED = 3  # worst weights in an error


class AccuracyError(FusionError):
    """Quantizing costs more accuracy than the user allows; the bundle is not published."""

    exit_code = 6


def export_calibrated(
    plan: ExportPlan, options: CalibrationOptions, output: Path, force: bool
) -> tuple[bundle.Manifest, QuantizationReport]:
    """Calibrate and write a bundle; what was calibrated is kept beside the output until the bundle is there.

    Raises :class:`AccuracyError`, and :class:`FusionError` for samples, weights or an output that will not do.
    """
    torch.set_num_threads(usable_processors())
    output = resolve_output(output)
    check_output(output, force)
    options, samples = checked(plan, options)
    producer = bundle.producer()
    asked = {key: value for key, value in asdict(options).items() if key not in ("data", "largest_drop")}
    settings = asked | {"torch": torch.__version__, "producer": producer}
    command = describe(plan, samples, settings)
    _check_disk(plan, options, output)
    with work_folder(output, command) as folder:
        try:
            mixed = None
            if options.is_mixed:
                plan, mixed = mix(plan, options, samples, folder)
            calibrated = calibrate(plan, samples, options.method, options.device, folder)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            told = not_enough_memory(f"calibrate on {options.device}", on_host=options.device == "cpu")
            raise FusionError(
                f"{told}: {str(error).splitlines()[0]}; close other programs, see --dry-run for what it takes, or use "
                "another --device."
            ) from None
        calibrated = replace(calibrated, report=replace(calibrated.report, mixed_precision=mixed))
        _check(calibrated.report, options.largest_drop)
        return write_bundle(plan, output, force, calibrated)


def checked(plan: ExportPlan, options: CalibrationOptions) -> tuple[CalibrationOptions, Samples]:
    """The samples, and the options with their true counts.

    Raises :class:`FusionError` for a device that is not there and for data that will not do, :class:`UsageError` for a
    bundle without quantized weights.
    """
    if not plan.quantized_formats:
        chosen = f"--{plan.options.precision}{' and these rules' if plan.options.requested.rules else ''}"
        raise UsageError(f"--calibrate is for weights to quantize; with {chosen} there are none: leave it out.")
    check_budget(plan, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FusionError("--device cuda needs a GPU and a build of torch with CUDA; use --device cpu.")
    samples = read_samples(options.data, options.samples, options.held_out)
    counts = len(samples.calibrating), len(samples.held_out)
    return replace(options, samples=counts[0], held_out=counts[1]), samples


def _check_disk(plan: ExportPlan, options: CalibrationOptions, output: Path) -> None:
    """States, finished weights and the bundle must fit. What an earlier run left counts as free."""
    needed = calibration_disk(plan, options) + plan.bundle_bytes
    place = hidden_parent(output)
    free = shutil.disk_usage(place).free + folder_bytes(output)
    if free < needed:
        raise FusionError(
            f"The disk of {place} has {free / 1e9:.2f} GB free; calibrating needs {needed / 1e9:.2f} GB for as "
            "long as it runs. Free some space, take fewer --samples, or choose another output."
        )


def _check(report: QuantizationReport, largest_drop: float | None) -> None:
    result = report.end_to_end
    if result is None or largest_drop is None or result.accuracy_drop <= largest_drop:
        return
    what = "likeliest tokens" if result.accuracy is None else "exact answers"
    worst = [linear.name for linear in report.worst()[:NAMED]]
    details = ", ".join(f"{name.lower()} {value}" for name, value in result.rows())
    raise AccuracyError(
        f"Quantizing costs {result.accuracy_drop:.1f} points of {what}, more than {largest_drop:g}; no bundle was "
        f"written ({details}). Give the worst weights ({', '.join(worst)}) 8 bits with --rule, use a smaller "
        "--group-size, or --int8."
    )
