"""Writing a planned bundle: weights stream through in blocks of rows, the folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_edge.export.data_writer import DataWriter
from fusion_edge.export.partial_folder import partial_folder
from fusion_edge.export.plan import ExportPlan
from fusion_edge.export.weights import CheckpointWeights
from fusion_edge.runtime import bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.progress import Progress
from fusion_edge.runtime.quantization_report import QuantizationReport
from fusion_edge.runtime.resources import usable_processors

if TYPE_CHECKING:
    from fusion_edge.quant.calibration.run import Calibrated  # needs torch; calibrated weights come with it

DISK_MARGIN_BYTES = 16 << 20


def write_bundle(
    plan: ExportPlan, output: Path, force: bool, calibrated: Calibrated | None = None
) -> tuple[bundle.Manifest, QuantizationReport]:
    """Write the bundle and rename it into place. Weights that are not calibrated are rounded to nearest.

    Raises :class:`FusionError` if the output exists and ``force`` is off, if the disk is too small, if another
    export is writing the same output, or if a weight is not finite. Leaves nothing behind then.
    """
    output = resolve_output(output)
    with partial_folder(output, "export") as folder:
        check_output(output, force)
        _check_disk(plan, output)
        for name, content in plan.small_files.items():
            (folder / name).write_bytes(content)
        elements = sum(parameter.size for parameter in plan.parameters.values())
        with Progress("Quantizing", elements, "M weights") as progress:
            weights = CheckpointWeights(plan.checkpoint, plan.parameters)
            writer = DataWriter(weights, plan.packed, calibrated, progress)
            for file in plan.data_files:
                writer.write(folder / file.name, file)
        names = [*plan.small_files, *(file.name for file in plan.data_files)]
        report = writer.report()
        if report.linears:
            (folder / bundle.QUANTIZATION).write_bytes(report.to_bytes())
            names.append(bundle.QUANTIZATION)
        sizes = {name: (folder / name).stat().st_size for name in names}
        with (
            Progress("Checksums", sum(sizes.values())) as progress,
            ThreadPoolExecutor(usable_processors()) as pool,
        ):
            digests = pool.map(lambda name: bundle.digest(folder / name, progress.advance), names)
            entries = tuple(bundle.FileEntry(n, sizes[n], d) for n, d in zip(names, digests, strict=True))
        manifest = plan.manifest(entries)
        (folder / bundle.MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            _flush(path)
    return manifest, report


def _flush(path: Path) -> None:
    """Have a file or folder on the disk before the rename: a power cut must not leave a torn file in a bundle."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The folder -------------------------------------------------------------------------------------------------


def resolve_output(output: Path) -> Path:
    """Where the bundle will be: a link to a bundle stays a link. Raises :class:`FusionError` without its folder."""
    output = Path(os.path.realpath(output))
    if not output.parent.is_dir():
        raise FusionError(f"{output.parent} is not a folder; create it first or choose another output.")
    return output


def check_output(output: Path, force: bool) -> None:
    """Raise :class:`FusionError` if something is there that may not be replaced."""
    if not output.exists():
        return
    is_bundle = (output / bundle.MANIFEST).is_file()
    if not force:
        raise FusionError(f"{output} exists; choose another output or pass --force to replace it.")
    if not is_bundle and not (output.is_dir() and not any(output.iterdir())):
        raise FusionError(f"{output} exists and is no bundle, so --force does not replace it; choose another output.")


def _check_disk(plan: ExportPlan, output: Path) -> None:
    needed, free = plan.bundle_bytes + DISK_MARGIN_BYTES, shutil.disk_usage(output.parent).free
    if free < needed:
        raise FusionError(
            f"The disk of {output.parent} has {free / 1e9:.2f} GB free; the bundle needs {needed / 1e9:.2f} GB. "
            "Free some space or choose another output."
        )
