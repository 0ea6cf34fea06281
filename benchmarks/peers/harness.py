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
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.latency.result_file import header
from fusion_edge.benchmarks.latency.statistics import Summary, summarize
from fusion_edge.benchmarks.peers.result import SCHEMA, ContestantResult, PeersResult
from fusion_edge.benchmarks.peers.runners.instruction_sets import INSTRUCTION_SETS
from fusion_edge.benchmarks.peers.runners.worker import Settings
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
    settings: Mapping[str, Settings] = field(default_factory=lambda: {"": {}})
    """Settings to try, by name."""

    def tried(self, isa: str | None) -> list[str]:
        """Return the names of the settings to try with an instruction set.

        None of ``--isa`` has bfloat16. Below AVX-512, OpenVINO fails to create kernels for dynamic quantization.
        """
        lacking = () if isa is None else ("bf16",) if isa == "avx512_vnni" else ("bf16", "groups of")
        return [name for name in self.settings if not any(part in name for part in lacking)]


@dataclass(frozen=True)
class Column:
    """Figure in the printed table."""

    title: str
    field: str
    """Field of the runners' dataclass of figures."""
    text: Callable[[float], str]
    higher_is_better: bool = False
    is_phase: bool = False
    """Whether a contestant's setting is chosen by it."""

    def speedup(self, first: float, other: float) -> float:
        """Return how many times better the first value is."""
        return first / other if self.higher_is_better else other / first

    def best(self, figures: Mapping[str, float]) -> str:
        """Return the key of the best value."""
        return (max if self.higher_is_better else min)(figures, key=figures.__getitem__)


@dataclass(frozen=True)
class PeerComparison:
    """Kind of comparison."""

    description: str
    runners: Mapping[str, Runner]
    """By name; each is an option ``--NAME LABEL=MODEL``."""
    workload: Callable[..., Any]
    """Frozen dataclass of ``worker.option`` fields; may raise :class:`UsageError`."""
    columns: Sequence[Column]
    """At least one is a phase."""


@dataclass(frozen=True)
class Contestant:
    """Engine with a model and one setting."""

    label: str
    runner: Runner
    model: Path
    python: str = sys.executable
    """Interpreter of an environment with the engine and fusion-edge."""
    setting: str = ""
    """Key of the runner's settings."""

    @property
    def title(self) -> str:
        """Label and setting."""
        return f"{self.label}: {self.setting}" if self.setting else self.label


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


def run_rounds(
    contestants: Sequence[Contestant], workload: Any, count: int, columns: Sequence[Column]
) -> dict[str, list[Round]]:
    """Run every contestant once, then those with the best setting of a phase; return the rounds by title.

    ``workload`` is an instance of a subclass of ``Workload`` (``runners/worker.py``).
    """
    rounds: dict[str, list[Round]] = {contestant.title: [] for contestant in contestants}
    running = contestants
    for number in range(1, count + 1):
        for contestant in running:
            if sys.stderr.isatty():
                sys.stderr.write(f"round {number} of {count}: {contestant.title}\n")
            rounds[contestant.title].append(run_worker(contestant, workload))
        best = _best_settings(contestants, rounds, columns)
        running = [contestant for contestant in contestants if contestant.title in best]
    return rounds


def _best_settings(
    contestants: Sequence[Contestant], rounds: Mapping[str, Sequence[Round]], columns: Sequence[Column]
) -> set[str]:
    """Return the titles of each label's best settings of the first round, one for each phase."""
    figures = {title: ran[0].report.figures for title, ran in rounds.items()}
    return {
        column.best({each.title: figures[each.title][column.field] for each in contestants if each.label == label})
        for label in {contestant.label for contestant in contestants}
        for column in columns
        if column.is_phase
    }


def run_worker(contestant: Contestant, workload: Any) -> Round:
    """Run a contestant once. Raises :class:`FusionError` if its worker fails; the worker prints the reason."""
    requests = dataclasses.asdict(workload), contestant.runner.settings[contestant.setting]
    command = [contestant.python, "-m", contestant.runner.module, str(contestant.model), *map(json.dumps, requests)]
    held = INSTRUCTION_SETS[workload.isa].environment if workload.isa else {}
    load_average, others = os.getloadavg()[0], _seconds_of_others()
    try:
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **held})
    except OSError as error:
        raise FusionError(f"Cannot run {contestant.python} for {contestant.title}: {error.strerror}.") from None
    if child.returncode:
        raise FusionError(
            f"The run of {contestant.title} failed with exit code {child.returncode}; see its output above. "
            f"{contestant.python} needs the engine, and fusion-edge without its dependencies."
        )
    try:
        report = from_json(WorkerReport, json.loads(child.stdout.splitlines()[-1]))
    except (IndexError, ValueError) as error:
        raise FusionError(f"{contestant.runner.module} printed no JSON report in its last line: {error}.") from None
    # At least 0: /proc/stat counts in coarser ticks than getrusage.
    return Round(report, load_average, max(0.0, round(_seconds_of_others() - others, 2)))


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
            contestant.title: ContestantResult(
                label=contestant.label,
                setting=contestant.setting,
                runner=contestant.runner.module.rpartition(".")[2],
                model=contestant.model.name,
                settings=rounds[contestant.title][0].report.settings,
                versions=rounds[contestant.title][0].report.versions,
                figures=figures(rounds[contestant.title]),
                load_average=tuple(one.load_average for one in rounds[contestant.title]),
                disturbance=tuple(one.disturbance for one in rounds[contestant.title]),
            )
            for contestant in contestants
        },
    )


def best_titles(result: PeersResult, label: str, columns: Sequence[Column]) -> list[str]:
    """Return the title of a label's best setting for each column: by the first round, which ran all settings.

    Columns that are no phase take the setting of the last phase.
    """
    ran = {title: one.figures for title, one in result.contestants.items() if one.label == label}
    best = {
        column.field: column.best({title: figures[column.field].values[0] for title, figures in ran.items()})
        for column in columns
        if column.is_phase
    }
    last = list(best.values())[-1]
    return [best.get(column.field, last) for column in columns]


def table(result: PeersResult, columns: Sequence[Column]) -> str:
    """Return a table of the medians of each label's best settings, with the first label's speedup in parentheses."""
    rows = [["", *(cell for column in columns for cell in (column.title, "")), "settings"]]
    first: list[float] = []
    for label in dict.fromkeys(contestant.label for contestant in result.contestants.values()):
        titles = best_titles(result, label, columns)
        medians = [
            result.contestants[title].figures[column.field].p50 for title, column in zip(titles, columns, strict=True)
        ]
        first = first or medians
        cells = [label]
        for column, ours, theirs in zip(columns, first, medians, strict=True):
            cells += [column.text(theirs), f"({column.speedup(ours, theirs):.2f}x)"]
        phases = [column.is_phase for column in columns]
        settings = dict.fromkeys(result.contestants[title].setting for title in compress(titles, phases))
        rows.append([*cells, "; ".join(settings)])
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
    for one in dataclasses.fields(comparison.workload()):
        option, text = f"--{one.name.replace('_', '-')}", one.metadata.get("help", one.name)
        if "choices" in one.metadata:
            add(option, choices=one.metadata["choices"], help=f"{text} (default: all that the processor has)")
            continue
        add(option, type=positive_integer, default=one.default, metavar="N", help=f"{text} (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write every measurement to a file")


def run(comparison: PeerComparison, arguments: argparse.Namespace) -> int:
    """Run a comparison with the options of :func:`add_options`; return the exit code."""
    fields = dataclasses.fields(comparison.workload())
    workload = comparison.workload(**{one.name: getattr(arguments, one.name) for one in fields})
    contestants = _contestants(comparison, arguments, workload.isa)
    rounds = run_rounds(contestants, workload, arguments.rounds, comparison.columns)
    result = peers_result(contestants, workload, rounds)
    sys.stdout.write(table(result, comparison.columns))
    if arguments.json is not None:
        write_whole(arguments.json, result.to_json())
    return 0


def _contestants(comparison: PeerComparison, arguments: argparse.Namespace, isa: str | None) -> list[Contestant]:
    pythons = dict(arguments.python)
    unknown = pythons.keys() - comparison.runners.keys()
    if unknown:
        raise UsageError(f"--python {min(unknown)}: unknown runner; choose from {', '.join(comparison.runners)}.")
    contestants = [
        Contestant(label, runner, Path(model), pythons.get(name, sys.executable), setting)
        for name, runner in comparison.runners.items()
        for label, model in getattr(arguments, name.replace("-", "_"))
        for setting in runner.tried(isa)
    ]
    if not contestants or len({contestant.title for contestant in contestants}) < len(contestants):
        options = " or ".join(f"--{name}" for name in comparison.runners)
        raise UsageError(f"Nothing to compare, or a label is not unique; pass {options} with one label each.")
    return contestants


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    return name, value
