"""Check everything that needs a GPU, in about 15 minutes (estimated), and write one archive to send back.

    python -m fusion_edge.acceptance --kernels kernels

The archive holds the result as JSON, the log of every step, and what TensorRT says about the engines. Exit code 0: no
step failed. Steps that the machine cannot run are skipped, with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fusion_edge.benchmarks.acceptance.output_folder import RESULT, SCRATCH, new_output, result_text
from fusion_edge.benchmarks.acceptance.plan import PARTS, steps
from fusion_edge.benchmarks.acceptance.runner import run_steps
from fusion_edge.benchmarks.acceptance.steps import FAIL, PASS, SKIPPED, StepResult, Workspace
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.system.output_file import write_whole

OUTPUT = Path("fusion-acceptance")
WORDS = {PASS: "passed", FAIL: "failed", SKIPPED: "skipped"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_main, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Return the parser with every option."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.acceptance",
        description="Check everything that needs a GPU: kernels, operators, engines of the demo model, and a part of a "
        "3B model with random weights. Every step runs in a process of its own.",
    )
    add = parser.add_argument
    add(
        "--bundle",
        type=Path,
        metavar="B",
        help="bundle exported with --target tensorrt; its own engines stay as they are: new ones are "
        "built beside links to its files (default: the demo model's, in a clone)",
    )
    add(
        "--kernels",
        type=Path,
        metavar="FOLDER",
        help="compiled kernels of the recursive alignment, made with "
        "python -m fusion_edge.kernels.triton.ahead_of_time (default: compile them with Triton)",
    )
    add("--only", action="append", choices=PARTS, metavar="PART", help=f"run this part: {', '.join(PARTS)}; repeatable")
    add(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="FOLDER",
        help="new or earlier folder of results; an archive is written beside it (default: %(default)s)",
    )
    add("--json", type=output_file, metavar="FILE", help="also write the result to this file")
    return parser


def _main(options: argparse.Namespace) -> int:
    for option, path in (("--bundle", options.bundle), ("--kernels", options.kernels)):
        if path is not None and not path.is_dir():
            raise UsageError(f"{option} {path} is not a folder; pass an existing one.")
    output = new_output(options.output)
    started = time.monotonic()
    results: list[StepResult] = []
    write_whole(output / RESULT, result_text(results, 0))
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=output) as scratch:
        bundle, kernels = (None if path is None else path.absolute() for path in (options.bundle, options.kernels))
        for result in run_steps(steps(options.only or PARTS), Workspace(output, Path(scratch), bundle, kernels)):
            sys.stdout.write(f"{result.status:8}{result.name:27}{result.seconds:6.1f} s  {result.summary}\n")
            sys.stdout.flush()
            results.append(result)
            # Now, because the next step may stop the machine.
            write_whole(output / RESULT, result_text(results, time.monotonic() - started))
    if options.json is not None:
        write_whole(options.json, (output / RESULT).read_bytes())
    archive = output.with_name(f"{output.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(output, output.name)
    counts = Counter(result.status for result in results)
    summary = ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items())
    sys.stdout.write(f"{summary}. Send {archive} back: an issue of fusion-edge, or a mail.\n")
    return 1 if counts[FAIL] else 0
