"""Write a planned bundle: weights stream through in blocks of rows, and the folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from fusion_edge.export.bundle.atomic_folder import atomic_folder
from fusion_edge.export.bundle.data_writer import DataWriter
from fusion_edge.export.bundle.durable_files import flush_file, flush_folder, write_file
from fusion_edge.export.bundle.folder_content import FolderContent, ForeignPathError, owned_paths
from fusion_edge.export.bundle.folder_lock import FOLDER_FLAGS, check_hidden_folder, locked_folder
from fusion_edge.export.bundle.hidden_folders import PURPOSES, hidden_folder, hidden_names, hidden_parent
from fusion_edge.export.bundle.weight_source import RoundToNearest, WeightSource
from fusion_edge.export.bundle.worker_pool import worker_pool
from fusion_edge.export.checkpoint.weights import CheckpointWeights
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.runtime.bundle import manifest as bundle
from fusion_edge.runtime.bundle.engine_manifest import ENGINES_MANIFEST
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER
from fusion_edge.runtime.bundle.files import FileEntry, digest
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.system.progress import Progress
from fusion_edge.runtime.system.resources import usable_processors

DISK_MARGIN_BYTES = 16 << 20


def write_bundle(
    plan: ExportPlan, output: Path, force: bool, source: WeightSource | None = None
) -> tuple[bundle.Manifest, QuantizationReport]:
    """Write the bundle and rename it into place. Without a ``source``, the checkpoint's weights are rounded to nearest.

    Raises :class:`FusionError`, and leaves nothing behind, if the output exists and ``force`` is off, if the disk is
    too small, if another export is writing the same output, or if a weight is not finite.
    """
    output = resolve_output(output)
    with atomic_folder(output, BUNDLE, lambda: check_output(output, force)) as folder:
        _check_disk(plan, output)
        for name, content in plan.small_files.items():
            write_file(folder / name, content)
        elements = sum(parameter.size for parameter in plan.parameters.values())
        with Progress("Quantizing", elements, "M weights") as progress:
            weights = source or RoundToNearest(CheckpointWeights(plan.checkpoint, plan.parameters))
            writer = DataWriter(plan, weights, progress)
            for file in plan.data_files:
                writer.write(folder / file.name, file)
        names = [*plan.small_files, *(file.name for file in plan.data_files)]
        report = writer.report()
        if report.linears:
            write_file(folder / bundle.QUANTIZATION, report.to_bytes())
            names.append(bundle.QUANTIZATION)
        sizes = {name: (folder / name).stat().st_size for name in names}
        with Progress("Checksums", sum(sizes.values())) as progress, worker_pool(usable_processors(), progress) as pool:
            digests = pool.map(lambda name: digest(folder / name, progress.advance), names)
            entries = tuple(FileEntry(n, sizes[n], d) for n, d in zip(names, digests, strict=True))
        manifest = plan.manifest(entries)
        write_file(folder / bundle.MANIFEST, manifest.to_text().encode())
        for name in (*names, bundle.MANIFEST):
            flush_file(folder / name)
        flush_folder(folder)
    return manifest, report


# Output folder ----------------------------------------------------------------------------------------------


def resolve_output(output: Path) -> Path:
    """Return the real path of the output, so that a link to a bundle stays a link.

    Raises :class:`FusionError` if its parent is not a folder, or if a link or a file has the name of one of its hidden
    folders.
    """
    output = Path(os.path.realpath(output))
    if not output.parent.is_dir():
        raise FusionError(f"{output.parent} is not a folder; create it first or choose another output.")
    for purpose in PURPOSES:
        check_hidden_folder(hidden_folder(output, purpose))
    return output


def check_output(output: Path, force: bool) -> None:
    """Raise :class:`FusionError` if the output exists and may not be replaced."""
    if not os.path.lexists(output):
        return
    if not force:
        raise FusionError(f"{output} exists; choose another output or pass --force to replace it.")
    manifest = output / bundle.MANIFEST
    try:
        descriptor = os.open(output, FOLDER_FLAGS)
        try:
            owned_paths(descriptor, BUNDLE.owned(manifest), output, hidden_names(output))
        finally:
            os.close(descriptor)
    except (NotADirectoryError, ForeignPathError) as error:
        if isinstance(error, ForeignPathError) and listed_files(manifest):
            raise FusionError(
                f"{error.path} does not belong to the bundle in {output}, so --force does not replace the "
                "bundle; move the file elsewhere or choose another output."
            ) from None
        raise FusionError(
            f"{output} exists and is not a bundle, so --force does not replace it; choose another output."
        ) from None
    for build in (output / ENGINES_FOLDER).glob(".*.partial"):
        with locked_folder(build, f"A fusion-build of {output} is running; wait for it or choose another output."):
            pass


def listed_files(manifest: Path) -> Collection[str]:
    """Return the files that ``bundle.json`` lists, in any schema version; none if it cannot be read."""
    try:
        return {entry["path"] for entry in json.loads(manifest.read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return set()


_BUILT = f"{ENGINES_FOLDER}/*-cc*-*"  # see engines_folder
BUNDLE = FolderContent(
    "export",
    (bundle.graph_file("*"), bundle.data_file("*"), bundle.TOKENIZER, bundle.QUANTIZATION),
    bundle.MANIFEST,
    listed_files,
    (
        f"{ENGINES_FOLDER}/",
        f"{_BUILT}/",
        f"{_BUILT}/{ENGINES_MANIFEST}",
        f"{_BUILT}/*.engine",
        f"{ENGINES_FOLDER}/*.timing",
        # Left by a killed build:
        f"{_BUILT}/.{ENGINES_MANIFEST}.*",
        f"{ENGINES_FOLDER}/.*.timing.*",
    ),
)
"""Content of a bundle's folder. Engines belong to this bundle alone and are replaced with it."""


def _check_disk(plan: ExportPlan, output: Path) -> None:
    place = hidden_parent(output)
    needed, free = plan.bundle_bytes + DISK_MARGIN_BYTES, shutil.disk_usage(place).free
    if free < needed:
        raise FusionError(
            f"The disk of {place} has {format_bytes(free)} free; the bundle needs {format_bytes(needed)}. "
            "Free some space or choose another output."
        )
