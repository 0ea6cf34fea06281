"""A result as text: a table for the terminal, rows for a spreadsheet."""

from __future__ import annotations

import csv as csv_format
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields

from fusion_edge.benchmarks.latency.report import labels
from fusion_edge.benchmarks.latency.result import Case, Limit, Measured, Memory, Rates, Result
from fusion_edge.benchmarks.latency.statistics import LARGEST_ERROR, MINIMUM_COUNT
from fusion_edge.runtime.formatting import format_bytes, format_table

_NONE = "-"
_NAME_WIDTH, _CELL_WIDTH = 22, 16
_SUMMARY_COLUMNS = ("count", "least", "median", "p90", "p99", "largest")
_CASE_COLUMNS: dict[str, Callable[[Measured], object]] = {
    "load_seconds": lambda measured: measured.load_seconds,
    "tokens_per_second": lambda measured: measured.tokens_per_second,
    "jitter": lambda measured: measured.jitter,
    "step_limit_seconds": lambda measured: measured.limits.step.seconds,
    "step_share": lambda measured: measured.limits.step.share,
    "prefill_limit_seconds": lambda measured: measured.limits.prefill.seconds,
    "prefill_share": lambda measured: measured.limits.prefill.share,
    "memory_loaded": lambda measured: measured.memory.loaded,
    "memory_load_peak": lambda measured: measured.memory.load_peak,
    "memory_steady": lambda measured: measured.memory.steady,
    "memory_peak": lambda measured: measured.memory.peak,
    "device_memory_steady": lambda measured: measured.device_memory and measured.device_memory.steady,
    "device_memory_peak": lambda measured: measured.device_memory and measured.device_memory.peak,
    "joules_a_token": lambda measured: measured.energy and measured.energy.joules_a_token,
    "is_noisy": lambda measured: measured.is_noisy,
}


def text(result: Result, width: int = 100) -> str:
    """For a terminal ``width`` columns wide: one case with its quantiles, or as many cases side by side as fit."""
    cases = [measured.case for measured in result.measured]
    blocks = [_header(result)]
    if len(cases) == 1:
        blocks += [format_table(list(_quantiles(result.measured[0]))), format_table(list(_figures(result.measured)))]
    else:
        harness = max((width - _NAME_WIDTH) // _CELL_WIDTH, 1)
        options = labels.differing_options(cases)
        for i in range(0, len(cases), harness):
            some = result.measured[i : i + harness]
            blocks.append(format_table([*_options(some, options), *_medians(some), *_figures(some)]))
    return "\n".join([*blocks, *_notes(result)])


def _header(result: Result) -> str:
    machine = result.machine
    lines = [
        f"{labels.bundle_name(result.bundle)}: {format_bytes(result.bundle.size)}",
        f"{machine.processor}, {machine.cores} cores, load {machine.load_average:.2f} at the start",
    ]
    lines += [f"probed on {device}: {_rates(rates)}" for device, rates in result.rates.items()]
    common = [measured.case for measured in result.measured]
    lines.append(labels.case_name(common[0], labels.common_options(common)))
    if machine.throttled:
        lines.append(f"clocks were held down: {machine.throttled}")
    return "\n".join(lines) + "\n"


def _rates(rates: Rates) -> str:
    known = ((rates.bandwidth, "B/s", "of memory"), (rates.multiplications, "MAC/s", "in products"))
    parts = [f"{labels.rate(rate, unit)} {what}" for rate, unit, what in known if rate is not None]
    return ", ".join([*parts, *(f"no {name} ({reason})" for name, reason in rates.not_measured.items())])


def _quantiles(measured: Measured) -> Iterator[list[str]]:
    yield ["", "median", "", "min", "p90", "p99", "max", "times"]
    for name, one in labels.measures(measured).items():
        times = [labels.duration(value) for value in (one.least, one.p90, one.p99, one.largest)]
        yield [name, labels.duration(one.median), labels.error(one), *times, f"{one.count:,}"]


def _options(some: Sequence[Measured], options: Sequence[str]) -> Iterator[list[str]]:
    for option in options:
        yield [option.replace("_", " "), *(labels.option_value(measured.case, option) for measured in some)]


def _medians(some: Sequence[Measured]) -> Iterator[list[str]]:
    summaries = [labels.measures(measured) for measured in some]
    for name in dict.fromkeys(name for one in summaries for name in one):
        found = [one.get(name) for one in summaries]
        yield [name, *(f"{labels.duration(one.median)} {labels.error(one):>6}" if one else _NONE for one in found)]


def _figures(some: Sequence[Measured]) -> Iterator[list[str]]:
    for name, cell in _FIGURES.items():
        cells = [cell(measured) for measured in some]
        if set(cells) != {None}:
            yield [name, *(one or _NONE for one in cells)]


def _notes(result: Result) -> list[str]:
    notes = [f"{remark}\n" for remark in labels.remarks(result)]
    if any(one.interval is None for measured in result.measured for one in labels.measures(measured).values()):
        notes.append(f"±?: fewer than {MINIMUM_COUNT} rounds, so how well the median is known is not.\n")
    if any(measured.is_noisy for measured in result.measured):
        notes.append(
            f"machine too noisy: some medians are not known to {LARGEST_ERROR:.0%}. Close other programs, fix the "
            "clocks, or give it more time.\n"
        )
    return notes


def _limit(limit: Limit) -> str | None:
    if limit.seconds is None or limit.share is None:
        return None
    return f"{labels.duration(limit.seconds)} ({limit.share:.0%})"


def _peak(memory: Memory | None) -> str | None:
    return None if memory is None else format_bytes(memory.peak)


def _steady(memory: Memory | None) -> str | None:
    return None if memory is None else format_bytes(memory.steady)


_FIGURES: dict[str, Callable[[Measured], str | None]] = {
    "tokens/s": lambda measured: labels.three_digits(measured.tokens_per_second),
    "jitter (p99 of a step)": lambda measured: f"+{measured.jitter:.1%}",
    "step limit, reached": lambda measured: _limit(measured.limits.step),
    "prefill limit, reached": lambda measured: _limit(measured.limits.prefill),
    "load": lambda measured: labels.duration(measured.load_seconds),
    "memory, loaded": lambda measured: format_bytes(measured.memory.loaded),
    "memory, steady": lambda measured: _steady(measured.memory),
    "memory, peak": lambda measured: _peak(measured.memory),
    "GPU memory, steady": lambda measured: _steady(measured.device_memory),
    "GPU memory, peak": lambda measured: _peak(measured.device_memory),
    "energy a token": lambda measured: (
        f"{labels.three_digits(measured.energy.joules_a_token)} J" if measured.energy else None
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
        for name, summary in labels.measures(measured).items():
            figures = [getattr(summary, column) for column in _SUMMARY_COLUMNS]
            interval = summary.interval or (None, None)
            writer.writerow([*asdict(measured.case).values(), name, *figures, *interval, *of_the_case])
    return output.getvalue()
