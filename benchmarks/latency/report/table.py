"""A result as text: a table for the terminal, CSV for a spreadsheet."""

from __future__ import annotations

import csv as csv_format
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields

from fusion_edge.benchmarks.latency.machine.memory import MemoryUse
from fusion_edge.benchmarks.latency.report import labels
from fusion_edge.benchmarks.latency.result import BenchResult, Case, CaseResult, Peaks, Utilization
from fusion_edge.benchmarks.latency.statistics import MIN_ROUNDS, TARGET_ERROR
from fusion_edge.runtime.formatting import format_bytes, format_table

_NONE = "-"
_NAME_WIDTH, _CELL_WIDTH = 22, 16
_SUMMARY_COLUMNS = ("count", "min", "p50", "p95", "p99", "max")
_CASE_COLUMNS: dict[str, Callable[[CaseResult], object]] = {
    "load_seconds": lambda one: one.load_seconds,
    "decode_tokens_per_second": lambda one: one.decode_tokens_per_second,
    "jitter": lambda one: one.jitter,
    "decode_roofline_seconds": lambda one: one.roofline.decode.roofline_seconds,
    "decode_roofline_share": lambda one: one.roofline.decode.share,
    "prefill_roofline_seconds": lambda one: one.roofline.prefill.roofline_seconds,
    "prefill_roofline_share": lambda one: one.roofline.prefill.share,
    "memory_loaded": lambda one: one.memory.loaded,
    "memory_load_peak": lambda one: one.memory.load_peak,
    "memory_steady": lambda one: one.memory.steady,
    "memory_peak": lambda one: one.memory.peak,
    "device_memory_steady": lambda one: one.device_memory and one.device_memory.steady,
    "device_memory_peak": lambda one: one.device_memory and one.device_memory.peak,
    "joules_per_token": lambda one: one.energy and one.energy.joules_per_token,
    "is_noisy": lambda one: one.is_noisy,
}


def text(result: BenchResult, width: int = 100) -> str:
    """Return text for a terminal ``width`` columns wide: one case with percentiles, or several cases side by side."""
    cases = [one.case for one in result.cases]
    blocks = [_header(result)]
    if len(cases) == 1:
        blocks += [format_table(list(_percentiles(result.cases[0]))), format_table(list(_figures(result.cases)))]
    else:
        side_by_side = max((width - _NAME_WIDTH) // _CELL_WIDTH, 1)
        options = labels.differing_options(cases)
        for i in range(0, len(cases), side_by_side):
            some = result.cases[i : i + side_by_side]
            blocks.append(format_table([*_options(some, options), *_medians(some), *_figures(some)]))
    return "\n".join([*blocks, *_notes(result)])


def _header(result: BenchResult) -> str:
    machine = result.machine
    lines = [
        f"{labels.bundle_name(result.bundle)}: {format_bytes(result.bundle.size)}",
        f"{machine.processor}, {machine.cores} cores, load average {machine.load_average:.2f} at the start",
    ]
    lines += [f"roofline of {device}: {_peaks(peaks)}" for device, peaks in result.peaks.items()]
    cases = [one.case for one in result.cases]
    lines.append(labels.case_name(cases[0], labels.common_options(cases)))
    if machine.throttled:
        lines.append(f"throttled: {machine.throttled}")
    return "\n".join(lines) + "\n"


def _peaks(peaks: Peaks) -> str:
    found = ((peaks.bandwidth, "B/s", "memory bandwidth"), (peaks.compute, "MAC/s", "compute"))
    parts = [f"{labels.rate(rate, unit)} {what}" for rate, unit, what in found if rate is not None]
    return ", ".join([*parts, *(f"{name} not measured ({reason})" for name, reason in peaks.not_measured.items())])


def _percentiles(result: CaseResult) -> Iterator[list[str]]:
    yield ["", "p50", "", "min", "p95", "p99", "max", "count"]
    for name, one in labels.measures(result).items():
        times = [labels.duration(value) for value in (one.min, one.p95, one.p99, one.max)]
        yield [name, labels.duration(one.p50), labels.error(one), *times, f"{one.count:,}"]


def _options(some: Sequence[CaseResult], options: Sequence[str]) -> Iterator[list[str]]:
    for option in options:
        yield [option.replace("_", " "), *(labels.option_value(one.case, option) for one in some)]


def _medians(some: Sequence[CaseResult]) -> Iterator[list[str]]:
    summaries = [labels.measures(one) for one in some]
    for name in dict.fromkeys(name for one in summaries for name in one):
        found = [one.get(name) for one in summaries]
        yield [name, *(f"{labels.duration(one.p50)} {labels.error(one):>6}" if one else _NONE for one in found)]


def _figures(some: Sequence[CaseResult]) -> Iterator[list[str]]:
    for name, cell in _FIGURES.items():
        cells = [cell(one) for one in some]
        if set(cells) != {None}:
            yield [name, *(one or _NONE for one in cells)]


def _notes(result: BenchResult) -> list[str]:
    notes = [f"{remark}\n" for remark in labels.remarks(result)]
    if any(summary.ci95 is None for one in result.cases for summary in labels.measures(one).values()):
        notes.append(f"±?: Too few rounds for a confidence interval; {MIN_ROUNDS} are needed.\n")
    if any(one.is_noisy for one in result.cases):
        notes.append(
            f"machine too noisy: the error of some medians exceeds {TARGET_ERROR:.0%}. Close other programs, fix the "
            "clocks, or raise --seconds.\n"
        )
    return notes


def _roofline(use: Utilization) -> str | None:
    if use.roofline_seconds is None or use.share is None:
        return None
    return f"{labels.duration(use.roofline_seconds)} ({use.share:.0%})"


def _peak(memory: MemoryUse | None) -> str | None:
    return None if memory is None else format_bytes(memory.peak)


def _steady(memory: MemoryUse | None) -> str | None:
    return None if memory is None else format_bytes(memory.steady)


_FIGURES: dict[str, Callable[[CaseResult], str | None]] = {
    "decode tokens/s": lambda one: labels.three_digits(one.decode_tokens_per_second),
    "jitter (p99/p50 - 1)": lambda one: f"{one.jitter:.1%}",
    "decode roofline": lambda one: _roofline(one.roofline.decode),
    "prefill roofline": lambda one: _roofline(one.roofline.prefill),
    "load": lambda one: labels.duration(one.load_seconds),
    "memory, loaded": lambda one: format_bytes(one.memory.loaded),
    "memory, steady": lambda one: _steady(one.memory),
    "memory, peak": lambda one: _peak(one.memory),
    "GPU memory, steady": lambda one: _steady(one.device_memory),
    "GPU memory, peak": lambda one: _peak(one.device_memory),
    "energy per token": lambda one: f"{labels.three_digits(one.energy.joules_per_token)} J" if one.energy else None,
    "machine": lambda one: "too noisy" if one.is_noisy else "quiet",
}


def csv(result: BenchResult) -> str:
    """Return CSV with a header and one row per case and stage: seconds, bytes and shares, empty for None."""
    output = io.StringIO()
    options = [field.name for field in fields(Case)]
    columns = [*options, "stage", *_SUMMARY_COLUMNS, "ci95_low", "ci95_high", *_CASE_COLUMNS]
    writer = csv_format.writer(output, lineterminator="\n")
    writer.writerow(columns)
    for one in result.cases:
        of_the_case = [value(one) for value in _CASE_COLUMNS.values()]
        for name, summary in labels.measures(one).items():
            figures = [getattr(summary, column) for column in _SUMMARY_COLUMNS]
            interval = summary.ci95 or (None, None)
            writer.writerow([*asdict(one.case).values(), name, *figures, *interval, *of_the_case])
    return output.getvalue()
