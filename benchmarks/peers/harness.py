"""Measure several engines in turn on one machine, each run in a fresh process.

Contestants take turns (A B C, A B C, ...), so a disturbance affects all of them. A fresh process starts with zero
memory and may use its own Python environment. The code inside that process is ``runners/worker.py``. A new comparison
is a :class:`PeerComparison` and its runners.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.latency.result_file import header
from fusion_edge.benchmarks.latency.statistics import Summary, summarize
from fusion_edge.benchmarks.peers.result import SCHEMA, ContestantResult, PeersResult
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.system.output_file import write_whole


@dataclass(frozen=True)
class Runner:
    """Module that measures one kind of model."""

    module: str
    """Run with ``python -m``; calls :func:`fusion_edge.benchmarks.peers.runners.worker.report`."""
    model: str
    """Description of its models for ``--help``."""


@dataclass(frozen=True)
class Column:
    """Figure in the printed table."""

    title: str
    field: str
    """Field of the runners' dataclass of figures."""
    text: Callable[[float], str]
    higher_is_better: bool = False

    def speedup(self, first: float, other: float) -> float:
        """Return how many times better the first value is."""
        return first / other if self.higher_is_better else other / first


@dataclass(frozen=True)
class PeerComparison:
    """Kind of comparison."""

    description: str
    runners: Mapping[str, Runner]
    """By name; each is an option ``--NAME LABEL=MODEL``."""
    workload: Callable[..., Any]
    """Frozen dataclass of ``worker.option`` fields; may raise :class:`UsageError`."""
    columns: Sequence[Column]


@dataclass(frozen=True)
class Contestant:
    """Engine with a model."""

    label: str
    runner: Runner
    model: Path
    python: str = sys.executable
    """Interpreter of an environment with the engine and fusion-edge."""


@dataclass(frozen=True)
class WorkerReport:
    """JSON line that a worker prints (``runners/worker.py``)."""

    figures: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Round:
    """One run of one contestant."""

    report: WorkerReport
    load_average: float
    disturbance: float
    """See :class:`ContestantResult`."""


def run_rounds(contestants: Sequence[Contestant], workload: Any, count: int) -> dict[str, list[Round]]:
    """Run every contestant once per round; return its rounds by label. ``workload`` is a dataclass instance."""
    rounds: dict[str, list[Round]] = {contestant.label: [] for contestant in contestants}
    for number in range(1, count + 1):
        for contestant in contestants:
            if sys.stderr.isatty():
                sys.stderr.write(f"round {number} of {count}: {contestant.label}\n")
            rounds[contestant.label].append(run_worker(contestant, workload))
    return rounds


def run_worker(contestant: Contestant, workload: Any) -> Round:
    """Run a contestant once. Raises :class:`FusionError` if its worker fails; the worker prints the reason."""
    request = json.dumps(dataclasses.asdict(workload))
    command = [contestant.python, "-m", contestant.runner.module, str(contestant.model), request]
    load_average, others = os.getloadavg()[0], _seconds_of_others()
    try:
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise FusionError(f"Cannot run {contestant.python} for {contestant.label}: {error.strerror}.") from None
    if child.returncode:
        raise FusionError(
            f"The run of {contestant.label} failed with exit code {child.returncode}; see its output above. "
            f"{contestant.python} needs the engine, and fusion-edge without its dependencies."
        )
    try:
        report = from_json(WorkerReport, json.loads(child.stdout.splitlines()[-1]))
    except (IndexError, ValueError) as error:
        raise FusionError(f"{contestant.runner.module} printed no JSON report in its last line: {error}.") from None
    return Round(report, load_average, round(_seconds_of_others() - others, 2))


def _seconds_of_others() -> float:
    """Return the processor seconds since boot, without this process and its ended children (``/proc/stat``)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return total - sum(usage.ru_utime + usage.ru_stime for usage in own)


def figures(rounds: Sequence[Round]) -> dict[str, Summary]:
    """Summarize each figure over the rounds."""
    return {name: summarize([float(one.report.figures[name]) for one in rounds]) for name in rounds[0].report.figures}


def peers_result(
    contestants: Sequence[Contestant], workload: Any, rounds: Mapping[str, Sequence[Round]]
) -> PeersResult:
    """Return everything that was measured. Paths of models and environments are left out."""
    return PeersResult(
        **header(SCHEMA, machine_info(None)),
        workload=dataclasses.asdict(workload),
        contestants={
            contestant.label: ContestantResult(
                runner=contestant.runner.module.rpartition(".")[2],
                model=contestant.model.name,
                settings=rounds[contestant.label][0].report.settings,
                versions=rounds[contestant.label][0].report.versions,
                figures=figures(rounds[contestant.label]),
                load_average=tuple(one.load_average for one in rounds[contestant.label]),
                disturbance=tuple(one.disturbance for one in rounds[contestant.label]),
            )
            for contestant in contestants
        },
    )


def table(result: PeersResult, columns: Sequence[Column]) -> str:
    """Return a table of medians, with the first contestant's speedup in parentheses."""
    rows = [["", *(cell for column in columns for cell in (column.title, ""))]]
    first = next(iter(result.contestants.values())).figures
    for label, contestant in result.contestants.items():
        cells: list[str] = []
        for column in columns:
            ours, theirs = first[column.field].p50, contestant.figures[column.field].p50
            cells += [column.text(theirs), f"({column.speedup(ours, theirs):.2f}x)"]
        rows.append([label, *cells])
    return format_table(rows)


def add_options(parser: argparse.ArgumentParser, comparison: PeerComparison) -> None:
    """Add the options of a comparison to a parser."""
    add = parser.add_argument
    for name, runner in comparison.runners.items():
        text = f"{runner.model}; repeatable"
        add(f"--{name}", action="append", default=[], type=_pair, metavar="LABEL=PATH", help=text)
    add(
        "--python",
        action="append",
        default=[],
        type=_pair,
        metavar="RUNNER=PATH",
        help="Python interpreter for a runner (default: this one); repeatable",
    )
    add("--rounds", type=positive_integer, default=3, metavar="N", help="runs per contestant (default: %(default)s)")
    for field in dataclasses.fields(comparison.workload()):
        option = f"--{field.name.replace('_', '-')}"
        text = f"{field.metadata.get('help', field.name)} (default: %(default)s)"
        add(option, type=positive_integer, default=field.default, metavar="N", help=text)
    add("--json", type=output_file, metavar="FILE", help="write every measurement to a file")


def run(comparison: PeerComparison, arguments: argparse.Namespace) -> int:
    """Run a comparison with the options of :func:`add_options`; return the exit code."""
    fields = dataclasses.fields(comparison.workload())
    workload = comparison.workload(**{field.name: getattr(arguments, field.name) for field in fields})
    contestants = _contestants(comparison, arguments)
    result = peers_result(contestants, workload, run_rounds(contestants, workload, arguments.rounds))
    sys.stdout.write(table(result, comparison.columns))
    if arguments.json is not None:
        write_whole(arguments.json, result.to_json())
    return 0


def _contestants(comparison: PeerComparison, arguments: argparse.Namespace) -> list[Contestant]:
    pythons = dict(arguments.python)
    unknown = pythons.keys() - comparison.runners.keys()
    if unknown:
        raise UsageError(f"--python {min(unknown)}: unknown runner; choose from {', '.join(comparison.runners)}.")
    contestants = [
        Contestant(label, runner, Path(model), pythons.get(name, sys.executable))
        for name, runner in comparison.runners.items()
        for label, model in getattr(arguments, name.replace("-", "_"))
    ]
    if not contestants or len({contestant.label for contestant in contestants}) < len(contestants):
        options = " or ".join(f"--{name}" for name in comparison.runners)
        raise UsageError(f"Nothing to compare, or a label is not unique; pass {options} with one label each.")
    return contestants


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    return name, value
