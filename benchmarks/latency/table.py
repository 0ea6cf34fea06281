"""A result as text: a table for the terminal, rows for a spreadsheet."""

from __future__ import annotations

import csv as csv_format
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields

from fusion_edge.benchmarks.latency import views
from fusion_edge.benchmarks.latency.result import Case, Measured, Result
from fusion_edge.benchmarks.latency.statistics import LARGEST_ERROR
from fusion_edge.runtime import cli

_NONE = "-"
_NAME_WIDTH, _CELL_WIDTH = 22, 16
_SUMMARY_COLUMNS = ("count", "least", "median", "p90", "p99", "largest")
_CASE_COLUMNS: dict[str, Callable[[Measured], object]] = {
    "load_seconds": lambda measured: measured.load_seconds,
    "tokens_per_second": lambda measured: measured.tokens_per_second,
    "jitter": lambda measured: measured.jitter,
    "step_limit_seconds": lambda measured: measured.limits and measured.limits.step_seconds,
    "step_share": lambda measured: measured.limits and measured.limits.step_share,
    "prefill_limit_seconds": lambda measured: measured.limits and measured.limits.prefill_seconds,
    "prefill_share": lambda measured: measured.limits and measured.limits.prefill_share,
    "memory_loaded": lambda measured: measured.memory.loaded,
    "memory_steady": lambda measured: measured.memory.steady,
    "memory_peak": lambda measured: measured.memory.peak,
    "memory_device": lambda measured: measured.memory.device,
    "joules_a_token": lambda measured: measured.energy and measured.energy.joules_a_token,
    "is_noisy": lambda measured: measured.is_noisy,
}


def text(result: Result, width: int = 100) -> str:
    """For a terminal ``width`` columns wide: stages by cases, as many cases side by side as fit."""
    cases = [measured.case for measured in result.measured]
    machine, rates = result.machine, result.rates
    lines = [
        f"{views.bundle_name(result.bundle)}: {cli.size(result.bundle.size)}",
        f"{machine.processor}, {machine.cores} cores, load {machine.load_average:.2f} at the start",
        f"probed: {views.rate(rates.bandwidth, 'B/s')} from memory, {views.rate(rates.multiplications, 'MAC/s')}",
        views.case_name(cases[0], views.common_options(cases)),
    ]
    if machine.throttled:
        lines.append(f"clocks were held down: {machine.throttled}")
    side_by_side = max((width - _NAME_WIDTH) // _CELL_WIDTH, 1)
    blocks = [result.measured[i : i + side_by_side] for i in range(0, len(cases), side_by_side)]
    options = views.differing_options(cases)
    tables = [cli.table(list(_rows(block, options))) for block in blocks]
    if any(measured.is_noisy for measured in result.measured):
        tables.append(
            f"machine too noisy: some medians are not known to {LARGEST_ERROR:.0%}. Close other programs, fix the "
            "clocks, or give it more time.\n"
        )
    return "\n".join(["\n".join(lines) + "\n", *tables])


def _rows(block: Sequence[Measured], options: Sequence[str]) -> Iterator[list[str]]:
    for option in options:
        yield [option.replace("_", " "), *(views.option_value(measured.case, option) for measured in block)]
    summaries = [views.measures(measured) for measured in block]
    for name in dict.fromkeys(name for one in summaries for name in one):
        found = [one.get(name) for one in summaries]
        yield [
            name,
            *(f"{views.duration(one.median)} {views.error(one):>6}" if one else _NONE for one in found),
        ]
    for name, cell in _FIGURES.items():
        cells = [cell(measured) for measured in block]
        if set(cells) != {None}:
            yield [name, *(one or _NONE for one in cells)]


def _limit(seconds: float, share: float) -> str:
    return f"{views.duration(seconds)} ({share:.0%})"


_FIGURES: dict[str, Callable[[Measured], str | None]] = {
    "tokens/s": lambda measured: views.three_digits(measured.tokens_per_second),
    "jitter (p99 of a step)": lambda measured: f"+{measured.jitter:.1%}",
    "limit of a step": lambda measured: (
        _limit(measured.limits.step_seconds, measured.limits.step_share) if measured.limits else None
    ),
    "limit of prefill": lambda measured: (
        _limit(measured.limits.prefill_seconds, measured.limits.prefill_share) if measured.limits else None
    ),
    "load": lambda measured: views.duration(measured.load_seconds),
    "memory, loaded": lambda measured: cli.size(measured.memory.loaded),
    "memory, steady": lambda measured: cli.size(measured.memory.steady),
    "memory, peak": lambda measured: cli.size(measured.memory.peak),
    "memory, GPU": lambda measured: None if measured.memory.device is None else cli.size(measured.memory.device),
    "energy a token": lambda measured: (
        f"{views.three_digits(measured.energy.joules_a_token)} J" if measured.energy else None
    ),
    "machine": lambda measured: "too noisy" if measured.is_noisy else "quiet enough",
}


def csv(result: Result) -> str:
    """One row for each case and stage, with a header; seconds, bytes and shares. What is not known is empty."""
    output = io.StringIO()
    options = [field.name for field in fields(Case)]
    columns = [*options, "stage", *_SUMMARY_COLUMNS, "interval_low", "interval_high", *_CASE_COLUMNS]
    writer = csv_format.writer(output, lineterminator="\n")
    writer.writerow(columns)
    for measured in result.measured:
        of_the_case = [value(measured) for value in _CASE_COLUMNS.values()]
        for name, summary in views.measures(measured).items():
            figures = [getattr(summary, column) for column in _SUMMARY_COLUMNS]
            writer.writerow([*asdict(measured.case).values(), name, *figures, *summary.interval, *of_the_case])
    return output.getvalue()
