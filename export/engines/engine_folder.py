"""Write the engines of a bundle for one platform into their folder, or check that they are up to date."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from fusion_edge.export.bundle.atomic_folder import atomic_folder, delete_output, locked_output
from fusion_edge.export.bundle.folder_content import FolderContent
from fusion_edge.export.engines.builder import BuildOptions, EngineBuilder
from fusion_edge.export.engines.cpu_reference import read_reference
from fusion_edge.export.engines.engine_check import WrongEnginesError, compare_with_cpu, skipped_reason
from fusion_edge.export.engines.jetsons import check_contiguous_memory, is_small
from fusion_edge.export.engines.optimization_profiles import engine_limits
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.bundle.engine_manifest import (
    ENGINES_MANIFEST,
    SCHEMA_VERSION,
    EngineCheck,
    EnginePlatform,
    Engines,
)
from fusion_edge.runtime.bundle.engines import bundle_digest, engines_folder, open_engines, read_engines
from fusion_edge.runtime.bundle.manifest import producer
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.system.jetson import Jetson, contiguous_memory, this_jetson
from fusion_edge.runtime.system.output_file import write_whole

DISK_MARGIN_BYTES = 64 << 20
ENGINES = FolderContent("build", ("*.engine",), ENGINES_MANIFEST)


def up_to_date_engines(
    bundle: Bundle, platform: EnginePlatform, max_context: int, options: BuildOptions, unsupported_reason: str | None
) -> Engines | None:
    """Return the existing engines, or None if they are missing, damaged, or were built with other options."""
    try:
        _, built = open_engines(bundle, platform)
    except FusionError:
        return None
    existing = built.max_context, built.parts, built.workspace, built.max_block, built.operator
    wanted = max_context, options.parts, options.workspace, options.max_block, _operator(unsupported_reason)
    return built if existing == wanted else None


def _operator(unsupported_reason: str | None) -> str:
    """Return what computes the recursive alignment: a plugin, or an ONNX function of standard operators."""
    return "plugin" if unsupported_reason is None else "function"


def write_engines(
    bundle: Bundle,
    library: Library,
    platform: EnginePlatform,
    max_context: int,
    options: BuildOptions,
    unsupported_reason: str | None,
) -> Engines:
    """Build all engines and write their folder atomically. Return their manifest.

    Raises :class:`FusionError` if the disk or a Jetson's contiguous memory is too small, if TensorRT cannot build an
    engine, if another process is building, or if the engines differ from the CPU: then none is kept. The timing cache
    keeps the times of those that were built.
    """
    folder = engines_folder(bundle, platform)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    needed = bundle.manifest.size + DISK_MARGIN_BYTES
    if free < needed:
        raise FusionError(
            f"The disk of {folder.parents[1]} has {format_bytes(free)} free; the engines need about "
            f"{format_bytes(needed)}. Free some space and build again."
        )
    timing_cache = folder.parent / f"{library.name}-{library.version}-cc{platform.compute_capability}.timing"
    limits, here = engine_limits(bundle.manifest, max_context), this_jetson()
    with atomic_folder(folder, ENGINES) as partial:
        builder = EngineBuilder(bundle, library, platform, limits, options, uses_plugins=unsupported_reason is None)
        if unsupported_reason is not None:
            sys.stderr.write(f"{unsupported_reason}.\n")
        if builder.decomposed:
            names = ", ".join(builder.decomposed)
            sys.stderr.write(f"{library.name} {library.version} does not support {names}: decomposed, and slower.\n")
        _check_memory(builder, here, options.checks_memory)
        engines = builder.build(partial, timing_cache)
        manifest = Engines(
            schema_version=SCHEMA_VERSION,
            producer=producer(),
            machine=platform,
            bundle=bundle_digest(bundle),
            max_context=max_context,
            workspace=options.workspace,
            parts=options.parts,
            max_block=options.max_block,
            timed_on=None if here is None or library.is_rtx else here.model,
            operator=_operator(unsupported_reason),
            engines=engines,
            check=EngineCheck(skipped_reason(bundle, platform, options.compares, options.reference is not None), ()),
        )
        del builder  # and its memory
        manifest = _compared(bundle, library, partial, manifest, options.reference)
        write_whole(partial / ENGINES_MANIFEST, manifest.to_text())
    return manifest


def compare_existing(
    bundle: Bundle, library: Library, built: Engines, is_wanted: bool, reference: Path | None = None
) -> Engines:
    """Compare engines with the CPU that could not be compared when they were built, and return their manifest.

    With a file of reference outputs they are compared anyway: another device may have compared them. The manifest is
    written again, unless it has an earlier comparison and there is none now. Raises :class:`FusionError` if another
    process is building, or if they differ: then they are deleted.
    """
    if reference is None and (built.check.skipped is None or built.check.is_final):
        return built
    reason = skipped_reason(bundle, built.machine, is_wanted, reference is not None)
    if reason is not None:
        return built if reference is None else replace(built, check=EngineCheck(reason, ()))
    folder = engines_folder(bundle, built.machine)
    with locked_output(folder, ENGINES):
        _check_unchanged(folder, built)
        try:
            result = _compared(bundle, library, folder, replace(built, check=EngineCheck(None, ())), reference)
        except WrongEnginesError as error:
            delete_output(folder, ENGINES)
            raise FusionError(f"{error} The engines are deleted.") from None
        if result.check.skipped is None or built.check.skipped is not None:
            write_whole(folder / ENGINES_MANIFEST, result.to_text())
    return result


def _check_unchanged(folder: Path, built: Engines) -> None:
    """Raise :class:`FusionError` if another process has replaced the engines since they were read."""
    try:
        is_same = read_engines(folder) == built
    except (OSError, ValueError, RecursionError):
        is_same = False
    if not is_same:
        raise FusionError(f"Another fusion-build has changed {folder} meanwhile; run the command again.")


def _compared(bundle: Bundle, library: Library, folder: Path, engines: Engines, reference: Path | None) -> Engines:
    """Return the manifest of the engines in ``folder`` with their comparison, unless it says why there is none."""
    if engines.check.skipped is not None:
        return engines
    expected = None if reference is None else read_reference(bundle, reference)
    return replace(engines, check=compare_with_cpu(bundle, library, folder, engines, expected))


def _check_memory(builder: EngineBuilder, here: Jetson | None, is_checked: bool) -> None:
    """Print the contiguous memory of a Jetson. Raise :class:`FusionError` if a small one has too little of it."""
    largest = builder.largest_block()
    if here is None:
        return
    memory = contiguous_memory()
    sys.stderr.write(f"largest block for weights: {format_bytes(largest)}; memory: {memory}\n")
    if is_small(here) and is_checked:
        check_contiguous_memory(largest, memory)
