"""Contestants measured side by side on one machine: in turn, each in a fresh process; medians, ratios to the first.

They take turns (A B C, A B C, ...), so that a disturbance hits all of them; a fresh process counts memory from zero and
lets every contestant have its own Python environment. The other half, inside that process, is
``runners/worker.py``. A :class:`Comparison` is all that a new kind of comparison has to write
besides its runners.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_facts
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.system.output_file import write_whole


@dataclass(frozen=True)
class Runner:
    """What measures one kind of model."""

    module: str
    """Run with ``python -m``; it calls :func:`fusion_edge.benchmarks.peers.runners.worker.answer`."""
    model: str
    """What its models are, for the command's help."""


@dataclass(frozen=True)
class Column:
    """A figure in the table."""

    title: str
    field: str
    """Of the runners' dataclass of figures."""
    text: Callable[[float], str]
    is_more_better: bool = False

    def ratio(self, first: float, other: float) -> float:
        """How many times better the first is."""
        return first / other if self.is_more_better else other / first


@dataclass(frozen=True)
class Comparison:
    """A kind of comparison."""

    description: str
    runners: Mapping[str, Runner]
    """By name; each is an option ``--NAME LABEL=MODEL`` of the command."""
    workload: Callable[..., Any]
    """A frozen dataclass of integers with defaults, each an option of the command; raises :class:`UsageError`."""
    columns: Sequence[Column]


@dataclass(frozen=True)
class Contestant:
    """What is compared."""

    label: str
    runner: Runner
    model: Path
    python: str = sys.executable
    """Interpreter of the environment that has what the runner needs, and fusion-edge."""


@dataclass(frozen=True)
class Answer:
    """What a runner's process says."""

    figures: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Turn:
    """One run of one contestant."""

    answer: Answer
    load_average: float
    """Of the last minute, just before."""
    disturbance: float
    """Processor seconds that everything else on the machine took meanwhile, a hypervisor included."""


def compare(contestants: Sequence[Contestant], workload: Any, rounds: int) -> dict[str, list[Turn]]:
    """Turns by label; every round runs every contestant once. ``workload`` is a dataclass instance."""
    turns: dict[str, list[Turn]] = {contestant.label: [] for contestant in contestants}
    for number in range(rounds):
        for contestant in contestants:
            if sys.stderr.isatty():
                sys.stderr.write(f"round {number + 1} of {rounds}: {contestant.label}\n")
            turns[contestant.label].append(run_alone(contestant, workload))
    return turns


def run_alone(contestant: Contestant, workload: Any) -> Turn:
    """One turn. Raises :class:`FusionError` if the runner fails, which has said why on standard error."""
    request = json.dumps(dataclasses.asdict(workload))
    command = [contestant.python, "-m", contestant.runner.module, str(contestant.model), request]
    load_average, others = os.getloadavg()[0], _other_seconds()
    try:
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise FusionError(f"Cannot run {contestant.python} for {contestant.label}: {error.strerror}.") from None
    if child.returncode:
        raise FusionError(
            f"The run of {contestant.label} failed with exit code {child.returncode}; what it said is above. Its "
            f"interpreter ({contestant.python}) needs the peer and, without dependencies, fusion-edge."
        )
    try:
        answer = from_json(Answer, json.loads(child.stdout.splitlines()[-1]))
    except (IndexError, ValueError) as error:
        raise FusionError(f"{contestant.runner.module} did not answer in its last line: {error}.") from None
    return Turn(answer, load_average, round(_other_seconds() - others, 2))


def _other_seconds() -> float:
    """Processor seconds since boot but for those of this process and its ended children (``man 5 proc``, ``stat``)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return total - sum(usage.ru_utime + usage.ru_stime for usage in own)


def medians(turns: Sequence[Turn]) -> dict[str, float]:
    """Figure by figure."""
    return {name: statistics.median(turn.answer.figures[name] for turn in turns) for name in turns[0].answer.figures}


def render(turns: Mapping[str, Sequence[Turn]], columns: Sequence[Column]) -> str:
    """A table of medians; in brackets how many times better the first contestant is."""
    rows = [["", *(cell for column in columns for cell in (column.title, ""))]]
    first = medians(next(iter(turns.values())))
    for label, one in turns.items():
        figures = medians(one)
        cells = (
            cell
            for column in columns
            for cell in (
                column.text(figures[column.field]),
                f"({column.ratio(first[column.field], figures[column.field]):.2f}x)",
            )
        )
        rows.append([label, *cells])
    return format_table(rows)


def report(contestants: Sequence[Contestant], workload: Any, turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Everything that was measured, as JSON; of a contestant's model and environment no more than the name."""
    machine = dataclasses.asdict(machine_facts(None))
    return {
        "machine": {name: machine[name] for name in ("processor", "cores", "memory", "governor", "system")},
        "workload": dataclasses.asdict(workload),
        "contestants": {
            contestant.label: {
                "runner": contestant.runner.module.rpartition(".")[2],
                "model": contestant.model.name,
                "settings": turns[contestant.label][0].answer.settings,
                "versions": turns[contestant.label][0].answer.versions,
                "turns": [
                    {**turn.answer.figures, "load_average": turn.load_average, "disturbance": turn.disturbance}
                    for turn in turns[contestant.label]
                ],
            }
            for contestant in contestants
        },
    }


def add_options(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """The options of a comparison."""
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
        help="interpreter of the environment that a runner needs (default: this one); repeatable",
    )
    add("--rounds", type=positive_integer, default=3, metavar="N", help="default: %(default)s")
    for field in dataclasses.fields(comparison.workload()):
        option = f"--{field.name.replace('_', '-')}"
        add(option, type=positive_integer, default=field.default, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write every single figure, too")


def run(comparison: Comparison, arguments: argparse.Namespace) -> int:
    """Do what :func:`add_options` was told; the exit code."""
    fields = dataclasses.fields(comparison.workload())
    workload = comparison.workload(**{field.name: getattr(arguments, field.name) for field in fields})
    contestants = _contestants(comparison, arguments)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UsageError(f"--json {arguments.json}: there is no folder {arguments.json.parent}; make it first.")
    turns = compare(contestants, workload, arguments.rounds)
    sys.stdout.write(render(turns, comparison.columns))
    if arguments.json is not None:
        text = json.dumps(report(contestants, workload, turns), indent=1)
        write_whole(arguments.json, text + "\n")
    return 0


def _contestants(comparison: Comparison, arguments: argparse.Namespace) -> list[Contestant]:
    pythons = dict(arguments.python)
    unknown = pythons.keys() - comparison.runners.keys()
    if unknown:
        raise UsageError(f"--python {min(unknown)}: there is no such runner; expected {', '.join(comparison.runners)}.")
    contestants = [
        Contestant(label, runner, Path(model), pythons.get(name, sys.executable))
        for name, runner in comparison.runners.items()
        for label, model in getattr(arguments, name.replace("-", "_"))
    ]
    if not contestants or len({contestant.label for contestant in contestants}) < len(contestants):
        options = " or ".join(f"--{name}" for name in comparison.runners)
        raise UsageError(f"There is nothing to compare; expected {options}, every label once.")
    return contestants


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    return name, value
