"""Command line, table and result file of benchmarks that measure a bundle in rounds."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import MachineInfo
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.system.output_file import write_whole

Times = dict[str, list[float]]
"""Seconds by what was timed."""


def rounds_parser(documentation: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of a bundle, ``--rounds`` and ``--json``, described by the first line of a module's docstring."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0] if documentation else None)
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--rounds", type=positive_integer, default=rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return parser


def percentiles(times: Mapping[str, Times]) -> dict[str, dict[str, dict[str, float]]]:
    """Return minimum, median and 99th percentile in seconds, by setting and by what was timed."""
    return {
        setting: {
            part: {
                "min": min(seconds),
                "p50": statistics.median(seconds),
                "p99": sorted(seconds)[len(seconds) * 99 // 100],
            }
            for part, seconds in parts.items()
        }
        for setting, parts in times.items()
    }


def percentile_table(times: Mapping[str, Times]) -> str:
    """Format :func:`percentiles` in milliseconds."""
    rows: list[tuple[str, ...]] = [("setting", "measured", "minimum", "p50", "p99")]
    for setting, parts in percentiles(times).items():
        for part, found in parts.items():
            rows.append((setting, part, *(f"{value * 1e3:.2f} ms" for value in found.values())))
    return format_table(rows)


def write_result(path: Path, given: str, rounds: int, machine: MachineInfo, measured: dict[str, Any]) -> None:
    """Write what was measured as JSON, after the command and the machine.

    ``given`` is the command's module, the bundle and its options, without ``--rounds``.
    """
    result = {
        "command": f"python -m fusion_edge.benchmarks.{given} --rounds {rounds}",
        "processor": machine.processor,
        "cores": machine.cores,
        "load_average": machine.load_average,
    }
    write_whole(path, json.dumps(result | measured, indent=1) + "\n")
