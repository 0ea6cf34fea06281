"""Measure decode steps while another process takes memory: with mapped, preloaded and locked weights.

    python -m fusion_edge.benchmarks.memory_pressure BUNDLE --log FILE --json FILE

The settings take turns in every round, each in a fresh process. The other process reads the file ``--log`` over and
over. Run the command in a container or a control group (``systemd-run --scope -p MemoryMax=4300M``) whose memory is
smaller than that file and the weights together, and keep both where the group read them first: copy the bundle in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.rounds import Times, percentile_table, percentiles, rounds_parser, write_result
from fusion_edge.benchmarks.spinning import decode_steps
from fusion_edge.runtime import load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.progress import Progress
from fusion_edge.runtime.system.resources import available_memory

SETTINGS: dict[str, dict[str, Any]] = {"mapped": {}, "preload": {"preload": True}, "lock": {"lock_memory": True}}
"""Arguments of :func:`load`."""
READER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
while True:
    for place in range(0, len(pages), mmap.PAGESIZE):
        pages[place]
"""
"""Keeps all pages of a file in use."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = rounds_parser(__doc__, 3)
    parser.add_argument(
        "--log", type=Path, required=True, metavar="FILE", help="large file that the other process reads"
    )
    parser.add_argument(
        "--steps", type=positive_integer, default=30, help="decode steps a round (default: %(default)s)"
    )
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    machine, memory = machine_info(None), available_memory()
    times: dict[str, Times] = defaultdict(lambda: defaultdict(list))
    with Progress("Measuring", options.rounds * len(SETTINGS), None) as progress:
        for _ in range(options.rounds):
            for name, arguments in SETTINGS.items():
                for part, seconds in measure(options, arguments).items():
                    times[name][part] += seconds
                progress.advance(1)
    sys.stdout.write(percentile_table(times))
    if options.json:
        given = f"memory_pressure BUNDLE --log FILE --steps {options.steps}"
        sizes = {"available_bytes": memory, "log_bytes": options.log.stat().st_size}
        write_result(options.json, given, options.rounds, machine, sizes | {"seconds": percentiles(times)})
    return 0


def measure(options: argparse.Namespace, arguments: dict[str, Any]) -> Times:
    """Return the seconds of loading, and of decode steps without and beside the reader, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_decode, args=(theirs, options.bundle, options.steps, arguments))
    process.start()
    theirs.close()
    try:
        times = _received(ours.recv)
        reader = subprocess.Popen([sys.executable, "-c", READER, str(options.log)], stderr=subprocess.DEVNULL)
        try:
            time.sleep(1)
            ours.send(None)
            times |= _received(ours.recv)
            if reader.poll() is not None:
                raise FusionError(f"The other process ended early; give it a file to read, not {options.log}.")
            return times
        finally:
            reader.kill()
            reader.wait()
    finally:
        process.join()


def _received(receive: Callable[[], Times]) -> Times:
    try:
        return receive()
    except EOFError:
        raise FusionError("The process that decodes has failed; see its error above.") from None


def _decode(pipe: Connection, bundle: Path, steps: int, arguments: dict[str, Any]) -> None:
    started = time.perf_counter()
    with load(bundle, device="cpu", **arguments) as fusion:
        times = {"load": [time.perf_counter() - started]}
        started = time.perf_counter()
        decode_steps(fusion, 1)
        times["first prefill and step"] = [time.perf_counter() - started]
        pipe.send(times | {"decode step alone": decode_steps(fusion, steps)})
        pipe.recv()
        pipe.send({"decode step beside the reader": decode_steps(fusion, steps)})


if __name__ == "__main__":
    sys.exit(main())
