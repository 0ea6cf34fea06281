"""Measure everything that the CPU kernels are held to on this machine, and print each goal with its figure.

    python -m fusion_edge.benchmarks.cpu_acceptance BUNDLE --json FILE \\
        --openvino-llm DIR --openvino-vision DIR --python ENV/bin/python

The bundle has the 3B layout, INT4 weights and an INT8 vision encoder (``peers.export_vision bundle-int8`` writes one);
random weights do. Exit code 0 means that it measured, whether or not goals are met.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.cpu_acceptance import comparisons, kernels, stages
from fusion_edge.benchmarks.cpu_acceptance.goals import Goal, goal_table
from fusion_edge.benchmarks.cpu_kernels import expect_library
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.rounds import rounds_parser, write_result
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.system.resources import usable_processors

PARTS = ("kernels", "stages", "peers")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = rounds_parser(__doc__, 2)
    add = parser.add_argument
    add("--only", action="append", choices=PARTS, help="measure this part only; repeatable")
    add("--openvino-llm", type=Path, metavar="DIR", help="LLM of the bundle, written by optimum-intel")
    add("--openvino-vision", type=Path, metavar="DIR", help="vision encoder, written by peers.export_vision")
    add("--python", default=sys.executable, metavar="PATH", help="Python with OpenVINO (default: this one)")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    expect_library()
    started, machine = time.perf_counter(), machine_info(None)
    measured: dict[str, Any] = {}
    goals: list[Goal] = []
    try:
        for part in options.only or PARTS:
            for figures, reached in _measure(part, options):
                measured[part] = figures
                goals += reached
    finally:  # a peer that fails takes no other figure with it
        if options.json and measured:
            measured["goals"] = [dataclasses.asdict(goal) | {"is_met": goal.is_met} for goal in goals]
            measured["minutes"] = round((time.perf_counter() - started) / 60, 1)
            write_result(options.json, "cpu_acceptance BUNDLE", options.rounds, machine, measured)
    sys.stdout.write(goal_table(goals))
    return 0


def _measure(part: str, options: argparse.Namespace) -> Iterator[tuple[Any, Iterable[Goal]]]:
    """Measure a part and print it. Yield its figures so far, and the goals of the last ones."""
    if part == "kernels":
        layers = kernels.measure()
        _print(format_table(kernels.rows(layers)))
        yield dataclasses.asdict(layers), kernels.goals(layers)
    elif part == "stages":
        ran = stages.measure(options.bundle, options.rounds)
        _print(format_table(stages.rows(ran)))
        yield [dataclasses.asdict(one) for one in ran], stages.goals(ran)
    else:
        models = comparisons.PeerModels(options.bundle, options.openvino_llm, options.openvino_vision, options.python)
        compared: list[dict[str, Any]] = []
        for one in comparisons.measure(models, usable_processors(), options.rounds):
            _print(comparisons.text(one))
            compared.append(dataclasses.asdict(one))
            yield compared, comparisons.goals([one])


def _print(table: str) -> None:
    sys.stdout.write(f"{table}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
