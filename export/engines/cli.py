"""``fusion-build``: the engines of a bundle for one kind of GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fusion_edge.export.bundle.atomic_folder import atomic_folder
from fusion_edge.export.bundle.folder_content import FolderContent
from fusion_edge.export.engines.builder import BuildOptions, EngineBuilder, why_no_plugins
from fusion_edge.export.engines.optimization_profiles import limits
from fusion_edge.export.planning.targets.tensorrt import TENSORRT, check_bundle
from fusion_edge.runtime.backends.cuda import open_cuda
from fusion_edge.runtime.backends.tensorrt.library import LIBRARIES, Library, find_library, first_library
from fusion_edge.runtime.bundle.engine_manifest import ENGINES_MANIFEST, SCHEMA_VERSION, EnginePlatform, Engines
from fusion_edge.runtime.bundle.engines import bundle_digest, engines_folder, open_engines
from fusion_edge.runtime.bundle.manifest import Manifest, producer
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle, verify
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import byte_count, positive_integer
from fusion_edge.runtime.errors import DeviceError, FusionError, UsageError
from fusion_edge.runtime.formatting import format_bytes, format_table
from fusion_edge.runtime.system.interruptible import is_abandoned
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.progress import Progress

CURRENT = "current"
OLDEST = (7, 5)
"""The oldest compute capability that TensorRT 10 and TensorRT-RTX build for."""
DISK_MARGIN_BYTES = 64 << 20
ENGINES = FolderContent("build", ("*.engine",), ENGINES_MANIFEST)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code. A process that was interrupted in the middle of a long step of TensorRT ends here."""
    code = run_command(_build, parser().parse_args(argv))
    if is_abandoned():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the terminal may be gone
                stream.flush()
        os._exit(code)  # the interpreter cannot end in an orderly way around a thread that is inside TensorRT
    return code


def parser() -> argparse.ArgumentParser:
    """Every option of ``fusion-build``."""
    parser = argparse.ArgumentParser(
        prog="fusion-build",
        description="Build the TensorRT engines of a bundle: on the Jetson that they are for, or with tensorrt-rtx on "
        "any x86-64 machine for a desktop GPU.",
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder that fusion-export --target tensorrt wrote")
    add("--library", choices=LIBRARIES, help="what builds them (default: the first of these that is installed)")
    add(
        "--device",
        type=_device,
        default=CURRENT,
        metavar="CC",
        help="compute capability to build for, e.g. 8.6 (tensorrt-rtx only); default: this machine's GPU",
    )
    add(
        "--max-context",
        type=positive_integer,
        metavar="N",
        help="positions of the KV cache, prompt and answer: every step reads as many (default: the bundle's)",
    )
    add(
        "--workspace",
        type=byte_count,
        metavar="SIZE",
        help="scratch memory that kernels may be tried with, e.g. 512MB (default: TensorRT's)",
    )
    add(
        "--parts",
        type=positive_integer,
        default=BuildOptions.parts,
        metavar="N",
        help="cut the LLM into N engines: building takes about a N-th of the memory (default: %(default)s)",
    )
    add(
        "--kernels",
        type=Path,
        metavar="FOLDER",
        help="compiled kernels of the recursive alignment, from "
        "python -m fusion_edge.kernels.triton.ahead_of_time (default: "
        "Triton compiles them; for TensorRT from 10.9 on)",
    )
    add("--force", action="store_true", help="build also if the engines are up to date")
    add("--verbose", action="store_true", help="print all that TensorRT says to standard error")
    add("--json", action="store_true", help="print the manifest of the engines as one JSON object")
    return parser


def _device(text: str) -> str:
    if text != CURRENT and not re.fullmatch(r"\d{1,2}\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.6")
    return text


def _build(arguments: argparse.Namespace) -> int:
    bundle = open_bundle(arguments.bundle)
    if bundle.manifest.target != TENSORRT.name:
        raise FusionError(
            f"{bundle.folder} was exported for {bundle.manifest.target}; "
            f"fusion-export {bundle.manifest.source} -o FOLDER --target tensorrt makes one to build from."
        )
    max_context = _max_context(bundle.manifest, arguments.max_context)
    library = first_library() if arguments.library is None else find_library(arguments.library)
    if not library.is_rtx:
        check_bundle(bundle)
    machine = _machine(library, arguments.device)
    options = BuildOptions(arguments.workspace, arguments.parts, arguments.kernels, arguments.verbose)
    no_plugins = why_no_plugins(library, machine, options)
    if no_plugins is not None and options.kernels is not None:
        raise UsageError(f"--kernels cannot be used: {no_plugins}; leave it out.")
    built = None if arguments.force else _up_to_date(bundle, machine, max_context, options, no_plugins)
    started = time.monotonic()
    if built is None:
        with Progress("Verifying", bundle.manifest.size) as progress:
            verify(bundle, progress.advance)
        result, state = _write(bundle, library, machine, max_context, options, no_plugins), "built"
    else:
        result, state = built, "up to date"
    folder = engines_folder(bundle, machine)
    if arguments.json:
        sys.stdout.write(json.dumps({"folder": str(folder), "state": state} | dataclasses.asdict(result)) + "\n")
    else:
        sys.stdout.write(_text(folder, result, state, time.monotonic() - started))
    return 0


def _max_context(manifest: Manifest, wanted: int | None) -> int:
    """Raises :class:`UsageError` for one that the bundle cannot have, or in which no question fits."""
    if wanted is None:
        return manifest.max_context
    least = manifest.minimum_context
    if not least <= wanted <= manifest.max_context:
        raise UsageError(
            f"--max-context {wanted} is out of range for this bundle; choose {least} (image tokens, latents and a "
            f"short question) to {manifest.max_context} (what it was exported with)."
        )
    return wanted


def _machine(library: Library, device: str) -> EnginePlatform:
    """What to build for. Raises :class:`UsageError`, :class:`FusionError`."""
    if device == CURRENT:
        try:
            device = open_cuda().compute_capability()
        except DeviceError as error:
            remedy = "pass --device 8.6 or another compute capability" if library.is_rtx else "build on the target"
            raise FusionError(f"This machine's GPU is not known: {error} Otherwise {remedy}.") from None
    elif not library.is_rtx:
        raise UsageError(f"--device is for tensorrt-rtx: {library.name} builds for the GPU that it runs on.")
    if tuple(map(int, device.split("."))) < OLDEST:
        raise FusionError(
            f"Compute capability {device} is too old: {library.name} needs {'.'.join(map(str, OLDEST))} or later; run "
            "a bundle exported with --target cuda or cpu on this machine."
        )
    return EnginePlatform(library.name, library.version, device)


def _up_to_date(
    bundle: Bundle, machine: EnginePlatform, max_context: int, options: BuildOptions, no_plugins: str | None
) -> Engines | None:
    """The engines that there are, if they are whole and what is asked for."""
    try:
        _, built = open_engines(bundle, machine)
    except FusionError:
        return None
    is_built = built.max_context, built.parts, built.workspace, built.operator
    return built if is_built == (max_context, options.parts, options.workspace, _operator(no_plugins)) else None


def _operator(no_plugins: str | None) -> str:
    """What computes the recursive alignment, by why there are no plugins."""
    return "plugin" if no_plugins is None else "function"


def _write(
    bundle: Bundle,
    library: Library,
    machine: EnginePlatform,
    max_context: int,
    options: BuildOptions,
    no_plugins: str | None,
) -> Engines:
    """Build into a temporary folder and rename it: engines exist whole or not at all."""
    folder = engines_folder(bundle, machine)
    folder.parent.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    needed = bundle.manifest.size + DISK_MARGIN_BYTES
    if free < needed:
        raise FusionError(
            f"The disk of {bundle.folder} has {format_bytes(free)} free; the engines need about {format_bytes(needed)}."
        )
    kept = folder.parent / f"{library.name}-{library.version}-cc{machine.compute_capability}.timing"
    with atomic_folder(folder, ENGINES) as partial:
        builder = EngineBuilder(
            bundle, library, machine, limits(bundle.manifest, max_context), options, uses_plugins=no_plugins is None
        )
        if no_plugins is not None:
            sys.stderr.write(f"{no_plugins}.\n")
        if builder.missing_operators:
            names = ", ".join(builder.missing_operators)
            sys.stderr.write(f"{library.name} {library.version} does not know {names}: older operators, and slower.\n")
        if kept.is_file():
            builder.timing_cache = kept.read_bytes()
        written = builder.build(partial)
        result = Engines(
            schema_version=SCHEMA_VERSION,
            producer=producer(),
            machine=machine,
            bundle=bundle_digest(bundle),
            max_context=max_context,
            workspace=options.workspace,
            parts=options.parts,
            operator=_operator(no_plugins),
            engines=written,
        )
        write_whole(partial / ENGINES_MANIFEST, result.to_text())
    if builder.timing_cache:
        write_whole(kept, builder.timing_cache)
    return result


def _text(folder: Path, built: Engines, state: str, seconds: float) -> str:
    rows = [
        (engine.file.path.removesuffix(".engine"), format_bytes(engine.file.size))
        for parts in built.engines.values()
        for engine in parts
    ]
    text = format_table([*rows, ("all", format_bytes(built.size))])
    if state == "built":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        state = f"built in {seconds:.0f} s with at most {format_bytes(peak)} of memory"
    return f"{text}{folder}: for {built.machine}, {built.max_context} positions; {state}\n"


if __name__ == "__main__":
    sys.exit(main())
