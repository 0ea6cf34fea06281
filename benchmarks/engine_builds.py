"""Measure ``fusion-build`` with TensorRT-RTX by number of parts: memory, time and size of the engines. Needs no GPU.

    python -m fusion_edge.benchmarks.engine_builds BUNDLE --device 12.0 --parts 8 4 --json FILE

Every build runs in a process of its own, beside links to the bundle's files, and its engines are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.acceptance.bundles import link
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.runtime.backends.tensorrt.library import find_library
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.system.output_file import write_whole

LIBRARY = "tensorrt-rtx"


@dataclass(frozen=True)
class BuildResult:
    """One run of ``fusion-build``."""

    parts: int
    peak_bytes: int
    """Most resident memory of its process."""
    wall_seconds: float
    cpu_seconds: float
    """Of all threads. Other programs on the machine change it little."""
    engine_bytes: Mapping[str, int]
    """By graph."""


def measure(bundle: Path, device: str, parts: int) -> BuildResult:
    """Build the engines of a bundle in a process of its own, without the comparison with the CPU.

    Raises :class:`FusionError` with the exit code if the build fails; its error is on standard error.
    """
    with tempfile.TemporaryDirectory(prefix=".engine-builds-", dir=bundle.parent) as folder:
        link(bundle, Path(folder))
        options = [f"--library={LIBRARY}", f"--device={device}", f"--parts={parts}", "--skip-comparison", "--json"]
        command = [sys.executable, "-m", "fusion_edge.export.engines.cli", folder, *options]
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:  # such as an interrupt
            process.kill()
            raise
        if process.returncode:
            raise FusionError(f"fusion-build ended with exit code {process.returncode}; see its error above.")
        seconds = time.monotonic() - started
    sizes = {
        name: sum(one["file"]["size"] for one in engines) for name, engines in json.loads(printed)["engines"].items()
    }
    return BuildResult(parts, used.ru_maxrss * 1024, seconds, used.ru_utime + used.ru_stime, sizes)


def table(results: Sequence[BuildResult]) -> str:
    """Return the results as Markdown."""
    rows = [
        f"| {one.parts} | {format_bytes(one.peak_bytes)} | {one.cpu_seconds:.0f} s "
        f"| {format_bytes(sum(one.engine_bytes.values()))} |"
        for one in results
    ]
    return "\n".join(["| parts | peak memory | CPU time | engines |", "|---|---|---|---|", *rows]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="bundle folder, exported for TensorRT")
    parser.add_argument("--device", default="12.0", metavar="CAPABILITY", help="default: %(default)s")
    parser.add_argument("--parts", type=positive_integer, nargs="+", default=[4], metavar="N", help="default: 4")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    bundle, library, machine = open_bundle(options.bundle), find_library(LIBRARY), machine_info(None)
    results = [measure(bundle.folder, options.device, parts) for parts in options.parts]
    if options.json is not None:
        facts: dict[str, Any] = {
            "command": f"python -m fusion_edge.benchmarks.engine_builds BUNDLE --device {options.device} --parts "
            + " ".join(map(str, options.parts)),
            "library": f"{library.name} {library.version}",
            "compute_capability": options.device,
            "processor": machine.processor,
            "load_average": machine.load_average,
            "bundle_bytes": bundle.manifest.size,
            "max_context": bundle.manifest.max_context,
            "linears_by_format": Counter(bundle.manifest.weights.values()),
            "builds": [asdict(one) for one in results],
        }
        write_whole(options.json, json.dumps(facts, indent=1) + "\n")
    sys.stdout.write(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
