"""Driver of a calibrated export: samples, bit allocation, calibration, accuracy check, bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fusion_edge.export.bundle.hidden_folders import hidden_parent
from fusion_edge.export.bundle.writer import check_output, resolve_output, write_bundle
from fusion_edge.export.calibration.bit_budget import allocate_bits, check_budget
from fusion_edge.export.calibration.estimate import calibration_disk
from fusion_edge.export.calibration.options import CalibrationOptions
from fusion_edge.export.calibration.run import calibrate
from fusion_edge.export.calibration.samples import Samples, read_samples
from fusion_edge.export.calibration.weight_store import CalibratedWeights
from fusion_edge.export.calibration.work_folder import command_text, folder_bytes, work_folder
from fusion_edge.export.planning.plan import ExportPlan, plan_export
from fusion_edge.runtime.bundle.manifest import Manifest, producer
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.errors import AccuracyError, FusionError, UsageError
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory, usable_processors

WORST_IN_ERROR = 3  # worst weights that an error names


def export_calibrated(
    plan: ExportPlan, options: CalibrationOptions, output: Path, force: bool
) -> tuple[Manifest, QuantizationReport]:
    """Calibrate and write a bundle. The calibrated weights stay beside the output until the bundle is complete.

    Raises :class:`AccuracyError`, and :class:`FusionError` for invalid samples, weights or output.
    """
    torch.set_num_threads(usable_processors())
    output = resolve_output(output)
    check_output(output, force)
    options, samples = check_samples(plan, options)
    _check_disk(plan, options, output)
    settings = {key: value for key, value in asdict(options).items() if key not in ("data", "largest_drop")}
    settings |= {"torch": torch.__version__, "producer": producer()}
    with work_folder(output, command_text(plan, samples, settings)) as folder:
        with _translate_out_of_memory(options.device):
            plan, weights = _calibrate(plan, options, samples, folder)
        _check_accuracy(weights.report, options.largest_drop)
        return write_bundle(plan, output, force, weights)


def _calibrate(
    plan: ExportPlan, options: CalibrationOptions, samples: Samples, folder: Path
) -> tuple[ExportPlan, CalibratedWeights]:
    """Allocate bits within the budget, if there is one, and calibrate. Returns the final plan and its weights."""
    allocation = None
    if options.has_budget:
        rules, allocation = allocate_bits(plan, options, samples, folder)
        plan = plan_export(plan.checkpoint, replace(plan.options.requested, rules=plan.options.requested.rules + rules))
    weights = calibrate(plan, samples, options.method, options.device, folder)
    return plan, weights.with_report(replace(weights.report, mixed_precision=allocation))


@contextmanager
def _translate_out_of_memory(device: str) -> Iterator[None]:
    """Translate torch's out-of-memory errors to :class:`FusionError`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = not_enough_memory(f"calibrate on {device}", on_host=device == "cpu")
        raise FusionError(
            f"{what}: {str(error).splitlines()[0]}; close other programs, check the estimate of --dry-run, or use "
            "another --device."
        ) from None


def check_samples(plan: ExportPlan, options: CalibrationOptions) -> tuple[CalibrationOptions, Samples]:
    """Read the samples; also return the options with their actual counts.

    Raises :class:`FusionError` for a missing device and invalid samples, :class:`UsageError` for a bundle without
    weights to quantize and a budget that is too small.
    """
    if not plan.quantized_formats:
        chosen = f"--{plan.options.precision}{' and these rules' if plan.options.requested.rules else ''}"
        raise UsageError(f"--calibrate quantizes weights; with {chosen} there are none to quantize: leave it out.")
    check_budget(plan, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FusionError("--device cuda needs a GPU and a build of torch with CUDA; use --device cpu.")
    samples = read_samples(options.data, options.samples, options.held_out)
    counts = len(samples.calibrating), len(samples.held_out)
    return replace(options, samples=counts[0], held_out=counts[1]), samples


def _check_disk(plan: ExportPlan, options: CalibrationOptions, output: Path) -> None:
    """Raise :class:`FusionError` unless calibration and bundle fit on disk. Files of an earlier run count as free."""
    needed = calibration_disk(plan, options) + plan.bundle_bytes
    place = hidden_parent(output)
    free = shutil.disk_usage(place).free + folder_bytes(output)
    if free < needed:
        raise FusionError(
            f"The disk of {place} has {free / 1e9:.2f} GB free; calibration needs {needed / 1e9:.2f} GB while it runs. "
            "Free some space, use fewer --samples, or choose another output."
        )


def _check_accuracy(report: QuantizationReport, largest_drop: float | None) -> None:
    """Raise :class:`AccuracyError` if the accuracy drops by more than ``largest_drop`` percentage points."""
    result = report.end_to_end
    if result is None or largest_drop is None or result.accuracy_drop <= largest_drop:
        return
    what = "top-1 tokens" if result.accuracy is None else "exact answers"
    worst = [linear.name for linear in report.worst()[:WORST_IN_ERROR]]
    details = ", ".join(f"{name.lower()} {value}" for name, value in result.rows())
    raise AccuracyError(
        f"Quantization costs {result.accuracy_drop:.1f} points of {what}, more than {largest_drop:g}; no bundle was "
        f"written ({details}). Give the worst weights ({', '.join(worst)}) 8 bits with --rule, use a smaller "
        "--group-size, or --int8."
    )
