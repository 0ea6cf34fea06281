"""``fusion-build``: build the TensorRT engines of a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fusion_edge.export.engines.builder import BuildOptions, plugins_unsupported_reason
from fusion_edge.export.engines.cpu_reference import read_reference, write_reference
from fusion_edge.export.engines.engine_check import check_text
from fusion_edge.export.engines.engine_folder import compare_existing, up_to_date_engines, write_engines
from fusion_edge.export.engines.jetsons import LIMITS, check_device, jetson_limits
from fusion_edge.export.planning.targets.tensorrt import TENSORRT, check_capability
from fusion_edge.runtime.backends.cuda import open_cuda
from fusion_edge.runtime.backends.tensorrt.library import LIBRARIES, Library, find_library, first_library
from fusion_edge.runtime.bundle.engine_manifest import EnginePlatform, Engines
from fusion_edge.runtime.bundle.engines import engines_folder
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle, verify
from fusion_edge.runtime.cli.bundle_argument import add_bundle, given_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import byte_count, positive_integer
from fusion_edge.runtime.errors import DeviceError, FusionError, UsageError, printable
from fusion_edge.runtime.formatting import format_bytes, format_table
from fusion_edge.runtime.system.interruptible import leave_abandoned
from fusion_edge.runtime.system.jetson import this_jetson
from fusion_edge.runtime.system.progress import Progress

CURRENT_DEVICE = "current"
_OF_BUILDS = {
    "--library": "library",
    "--device": "device",
    "--max-context": "max_context",
    "--workspace": "workspace",
    "--parts": "parts",
    "--max-block": "max_block",
    "--for": "jetson",
    "--skip-memory-check": "skip_memory_check",
    "--kernels": "kernels",
    "--verbose": "verbose",
}
"""Names of the values of options that change how engines are built."""
OLDEST_DEVICE = (7, 5)
"""Oldest compute capability that TensorRT 10 and TensorRT-RTX build for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Does not return after an interrupt inside a long call of TensorRT."""
    return leave_abandoned(run_command(_build, parser().parse_args(argv)))


def parser() -> argparse.ArgumentParser:
    """Return the parser with every option of ``fusion-build``."""
    parser = argparse.ArgumentParser(
        prog="fusion-build",
        description="Build the TensorRT engines of a bundle: on the Jetson that will run them, or with tensorrt-rtx on "
        "any x86-64 machine for a desktop GPU.",
    )
    add = parser.add_argument
    add_bundle(parser, "bundle exported with fusion-export --target tensorrt")
    add("--library", choices=LIBRARIES, help="library to build with (default: the first of these that is installed)")
    add(
        "--device",
        type=_compute_capability,
        default=CURRENT_DEVICE,
        metavar="CC",
        help="compute capability to build for, e.g. 8.6; tensorrt-rtx only (default: this machine's GPU)",
    )
    add(
        "--max-context",
        type=positive_integer,
        metavar="N",
        help="KV cache size in tokens, prompt and answer; smaller is faster (default: the bundle's)",
    )
    add(
        "--workspace",
        type=byte_count,
        metavar="SIZE",
        help="scratch memory for kernels, e.g. 512MB (default: 512MB for a Jetson with 8 GB, otherwise TensorRT's)",
    )
    add(
        "--parts",
        type=positive_integer,
        default=BuildOptions.parts,
        metavar="N",
        help="partition the LLM into N engines, which divides the memory to build by about N (default: %(default)s)",
    )
    add(
        "--max-block",
        type=byte_count,
        metavar="SIZE",
        help="cut graphs and linears so that the weights of an engine, and every weight in float16, fit in SIZE, e.g. "
        "400MB (default: 400MB for a Jetson with 8 GB, otherwise no limit)",
    )
    add(
        "--for",
        dest="jetson",
        choices=LIMITS,
        help="Jetson that will run the engines, with its limits: build on another Orin, and copy the folder engines/ "
        "(default: this machine)",
    )
    add("--skip-memory-check", action="store_true", help="build on a Jetson even if its contiguous memory is too small")
    _add_comparison(parser)
    add(
        "--kernels",
        type=Path,
        metavar="FOLDER",
        help="compiled kernels of the recursive alignment, for TensorRT 10.9 or later, made with "
        "python -m fusion_edge.kernels.triton.ahead_of_time (default: compile them with Triton)",
    )
    add("--force", action="store_true", help="build even if the engines are up to date, or replace a reference")
    add("--verbose", action="store_true", help="print all messages of TensorRT to standard error")
    add("--json", action="store_true", help="print the engines' manifest as one JSON object")
    return parser


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison with the CPU."""
    add = parser.add_mutually_exclusive_group().add_argument
    add(
        "--reference",
        type=Path,
        metavar="FILE",
        help="compare the engines with the outputs in FILE, for a device that cannot run the bundle on its CPU "
        "(default: run it on this CPU)",
    )
    add(
        "--write-reference",
        type=Path,
        metavar="FILE",
        help="run the bundle on this CPU, write FILE for --reference, and build nothing; needs no GPU and no TensorRT",
    )
    add("--skip-comparison", action="store_true", help="do not compare the engines with the CPU")


def _compute_capability(text: str) -> str:
    if text != CURRENT_DEVICE and not re.fullmatch(r"\d{1,2}\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.6")
    return text


def _build(arguments: argparse.Namespace) -> int:
    bundle = open_bundle(given_bundle(arguments).folder)
    if bundle.manifest.target != TENSORRT.name:
        raise FusionError(
            f"{bundle.folder} was exported for {bundle.manifest.target}; expected tensorrt. Run "
            f"fusion-export {bundle.manifest.source} -o FOLDER --target tensorrt and build from that folder."
        )
    if arguments.write_reference is not None:
        return _write_reference(bundle, arguments)
    if arguments.reference is not None:
        read_reference(bundle, arguments.reference)  # an error before the build, not after it
    max_context = _max_context(bundle.manifest, arguments.max_context)
    library = first_library() if arguments.library is None else find_library(arguments.library)
    platform = _platform(library, arguments.device)
    check_capability(bundle, platform.compute_capability)
    options = _options(arguments, platform)
    unsupported_reason = plugins_unsupported_reason(library, platform, options)
    if unsupported_reason is not None and options.kernels is not None:
        raise UsageError(f"--kernels cannot be used ({unsupported_reason}); leave it out.")
    current = (
        None if arguments.force else up_to_date_engines(bundle, platform, max_context, options, unsupported_reason)
    )
    started = time.monotonic()
    if current is None:
        with Progress("Verifying", bundle.manifest.size) as progress:
            verify(bundle, progress.advance)
        result, state = write_engines(bundle, library, platform, max_context, options, unsupported_reason), "built"
    else:
        result = compare_existing(bundle, library, current, options.compares, options.reference)
        state = "up to date"
    folder = engines_folder(bundle, platform)
    if arguments.json:
        sys.stdout.write(json.dumps({"folder": str(folder), "state": state} | dataclasses.asdict(result)) + "\n")
    else:
        sys.stdout.write(_report(folder, result, state, time.monotonic() - started))
    return 0


def _write_reference(bundle: Bundle, arguments: argparse.Namespace) -> int:
    defaults = parser()
    for option, name in _OF_BUILDS.items():
        if getattr(arguments, name) != defaults.get_default(name):
            raise UsageError(f"{option} is about building, and --write-reference builds nothing; leave it out.")
    path: Path = arguments.write_reference
    reference = write_reference(bundle, path, arguments.force)
    size = path.stat().st_size
    if arguments.json:
        sys.stdout.write(json.dumps({"reference": str(path), "bytes": size, "made_by": reference.made_by}) + "\n")
    else:
        sys.stdout.write(f"{path}: outputs of {reference.made_by}, {format_bytes(size)}\n")
    return 0


def _options(arguments: argparse.Namespace, platform: EnginePlatform) -> BuildOptions:
    """Return the options, with the defaults of a Jetson. Raises :class:`UsageError` if ``--for`` does not fit."""
    here = this_jetson()
    if arguments.jetson is not None:
        check_device(arguments.jetson, platform.compute_capability, here)
    limits = jetson_limits(arguments.jetson, here)
    return BuildOptions(
        workspace=limits.workspace if arguments.workspace is None else arguments.workspace,
        parts=arguments.parts,
        max_block=limits.max_block if arguments.max_block is None else arguments.max_block,
        kernels=arguments.kernels,
        checks_memory=not arguments.skip_memory_check,
        compares=not arguments.skip_comparison,
        reference=arguments.reference,
        verbose=arguments.verbose,
    )


def _max_context(manifest: Manifest, requested: int | None) -> int:
    """Return the context size in tokens. Raises :class:`UsageError` if it is too small for a question or too large."""
    if requested is None:
        return manifest.max_context
    minimum = manifest.minimum_context
    if not minimum <= requested <= manifest.max_context:
        raise UsageError(
            f"--max-context {requested} is out of range for this bundle; choose {minimum} (image tokens, latents and a "
            f"short question) to {manifest.max_context} (the bundle's)."
        )
    return requested


def _platform(library: Library, device: str) -> EnginePlatform:
    """Return the platform to build for. Raises :class:`UsageError` or :class:`FusionError` if it is not supported."""
    if device == CURRENT_DEVICE:
        try:
            device = open_cuda().compute_capability()
        except DeviceError as error:
            other = "pass its compute capability, such as --device 8.6" if library.is_rtx else "build on its machine"
            raise FusionError(f"This machine's GPU is unknown: {error} For another GPU, {other}.") from None
    elif not library.is_rtx:
        raise UsageError(f"--device requires tensorrt-rtx: {library.name} builds only for this machine's GPU.")
    if tuple(map(int, device.split("."))) < OLDEST_DEVICE:
        raise FusionError(
            f"Compute capability {device} is too old: {library.name} requires {'.'.join(map(str, OLDEST_DEVICE))} or "
            "later. Run a bundle exported with --target cuda or cpu on this machine."
        )
    return EnginePlatform(library.name, library.version, device)


def _report(folder: Path, built: Engines, state: str, seconds: float) -> str:
    rows = [
        (engine.file.path.removesuffix(".engine"), format_bytes(engine.file.size))
        for partitions in built.engines.values()
        for engine in partitions
    ]
    text = format_table([*rows, ("total", format_bytes(built.size))])
    for name, reason in built.float16_parts.items():
        text += printable(f"{name} has float16 in place of INT8, which failed: {reason}") + "\n"
    text += check_text(built.check)
    if state == "built":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        state = f"built in {seconds:.0f} s, peak memory {format_bytes(peak)}"
    return f"{text}{folder}: {built.machine}, context of {built.max_context} tokens; {state}\n"


if __name__ == "__main__":
    sys.exit(main())
