"""Command line and result file of benchmarks that measure a bundle in rounds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import MachineInfo
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole


def rounds_parser(documentation: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of a bundle, ``--rounds`` and ``--json``, described by the first line of a module's docstring."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0] if documentation else None)
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--rounds", type=positive_integer, default=rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return parser


def write_result(path: Path, module: str, rounds: int, machine: MachineInfo, measured: dict[str, Any]) -> None:
    """Write what was measured as JSON, after the command and the machine."""
    result = {
        "command": f"python -m fusion_edge.benchmarks.{module} BUNDLE --rounds {rounds}",
        "processor": machine.processor,
        "cores": machine.cores,
        "load_average": machine.load_average,
    }
    write_whole(path, json.dumps(result | measured, indent=1) + "\n")
