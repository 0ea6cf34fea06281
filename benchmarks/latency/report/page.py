"""A result as one self-contained HTML file: no script, no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fusion_edge.benchmarks.latency.report import charts, labels
from fusion_edge.benchmarks.latency.report.case import case_details, legend, time_format, track
from fusion_edge.benchmarks.latency.report.charts import Markup, element, join
from fusion_edge.benchmarks.latency.report.style import CSS
from fusion_edge.benchmarks.latency.result import BenchResult, Case, CaseResult
from fusion_edge.benchmarks.latency.statistics import TARGET_ERROR
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.stages import DECODE_STEP

_SERIES_COLORS = ("blue", "orange", "green", "pink", "sky", "red", "yellow")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class _Column:
    """Column of the table that compares cases."""

    name: str
    value: Callable[[CaseResult], float]
    text: Callable[[float], str]


_COLUMNS = (
    _Column("Time to first token", lambda one: one.ttft.p50, labels.duration),
    _Column("Follow-up TTFT", lambda one: one.followup_ttft.p50, labels.duration),
    _Column("Decode tokens/s", lambda one: one.decode_tokens_per_second, labels.three_digits),
    _Column("Peak memory", lambda one: float(one.memory.peak), format_bytes),
)


def html_report(result: BenchResult) -> str:
    """Return the whole file."""
    cases = [one.case for one in result.cases]
    title = f"Latency of {result.bundle.source}"
    body = [element("h1", title), _subtitle(result), *_warnings(result)]
    if len(cases) == 1:
        case = element("p", labels.case_name(cases[0]), class_="muted")
        body += [element("h2", "Result"), case, case_details(result.cases[0], result)]
    else:
        body += [element("h2", "Cases side by side"), _comparison(result), _over_context(result)]
        body += [element("h2", "All cases"), *_folded(result)]
    body += [element("h2", "Setup"), _facts(result), _command(result)]
    return document(title, body)


def document(title: str, body: Sequence[str], css: str = "") -> str:
    """Return a whole file with its style sheet, and ``css`` after it."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(CSS + css)),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _subtitle(result: BenchResult) -> Markup:
    bundle, machine = result.bundle, result.machine
    where = machine.gpu or machine.processor
    text = f"{bundle.precision} for {bundle.target}, {format_bytes(bundle.size)}, on {where}, {result.created}"
    return element("p", text, class_="muted")


def _warnings(result: BenchResult) -> list[Markup]:
    noisy = sum(one.is_noisy for one in result.cases)
    texts = []
    if noisy:
        which = "" if len(result.cases) == 1 else f" in {noisy} of {len(result.cases)} cases"
        texts.append(
            f"The machine was too noisy{which}: the error of some medians exceeds {TARGET_ERROR:.0%}. Ignore small "
            "differences."
        )
    texts += labels.remarks(result)
    if result.machine.throttled:
        texts.append(f"Throttled: {result.machine.throttled}.")
    return [element("p", text, class_="warning") for text in texts]


def _comparison(result: BenchResult) -> Markup:
    cases = [one.case for one in result.cases]
    options = labels.differing_options(cases)
    most = [max(map(column.value, result.cases)) for column in _COLUMNS]
    rows = []
    for i, one in enumerate(result.cases):
        link = element("a", labels.case_name(one.case, options), href=f"#{_id(i)}")
        cells = [element("th", link, *_badge(one))]
        for column, largest in zip(_COLUMNS, most, strict=True):
            value = column.value(one)
            cells.append(element("td", column.text(value), track(value / largest), data_name=column.name))
        rows.append(element("tr", *cells))
    header = element("tr", element("th", "Case"), *(element("th", column.name) for column in _COLUMNS))
    table = element("table", element("thead", header), element("tbody", *rows), class_="cases")
    common = labels.case_name(cases[0], labels.common_options(cases))
    note = [element("p", f"All cases: {common}.", class_="note muted")] if common else []
    return element("div", table, *note, class_="card")


def _badge(one: CaseResult) -> list[str]:
    return [" ", element("span", "too noisy", class_="badge")] if one.is_noisy else []


def _over_context(result: BenchResult) -> Markup:
    """Return a plot of decode steps over context, if cases differ in it."""
    groups: dict[Case, list[CaseResult]] = {}
    for one in result.cases:
        groups.setdefault(replace(one.case, context=0), []).append(one)
    groups = {case: sorted(group, key=lambda one: one.case.context) for case, group in groups.items() if len(group) > 1}
    if not groups:
        return Markup()
    options = labels.differing_options(list(groups))
    series = [_series(labels.case_name(case, options), group) for case, group in groups.items()]
    colors = [_SERIES_COLORS[i % len(_SERIES_COLORS)] for i in range(len(series))]
    points = [point for one in series for point in one.points]
    x = charts.Axis(0, 1.05 * max(point[0] for point in points), lambda value: f"{value:,.0f}", "context, tokens")
    high = max(point[3] for point in points)
    y = charts.Axis(0, 1.1 * high, time_format(high))
    note = "Median of a decode step with its 95% confidence interval; dashed: the bandwidth roofline."
    named = [(one.name, color) for one, color in zip(series, colors, strict=True) if one.name]
    return element(
        "figure",
        element("h3", "Decode step over context"),
        charts.lines(x, y, series, colors, note),
        legend(named),
        element("figcaption", note),
        class_="card",
        style="margin-top:14px",
    )


def _series(name: str, group: Sequence[CaseResult]) -> charts.Series:
    points = []
    for one in group:
        step = one.stages[DECODE_STEP]
        low, high = step.ci95 or (step.p50, step.p50)
        points.append((float(one.case.context), low, step.p50, high))
    rooflines = ((float(one.case.context), one.roofline.decode.roofline_seconds) for one in group)
    roofline = tuple((context, seconds) for context, seconds in rooflines if seconds is not None)
    return charts.Series(name, tuple(points), roofline)


def _folded(result: BenchResult) -> list[Markup]:
    options = labels.differing_options([one.case for one in result.cases])
    parts = []
    for i, one in enumerate(result.cases):
        figures = (
            f" TTFT {labels.duration(one.ttft.p50)}, {labels.three_digits(one.decode_tokens_per_second)} tokens/s "
        )
        summary = element(
            "summary",
            labels.case_name(one.case, options),
            element("span", figures, class_="figures"),
            *_badge(one),
        )
        # The link's target is inside, so that following the link unfolds the case.
        target = element("div", case_details(one, result), id=_id(i))
        parts.append(element("details", summary, target))
    return parts


def _id(i: int) -> str:
    return f"case-{i + 1}"


def _facts(result: BenchResult) -> Markup:
    bundle, machine = result.bundle, result.machine
    what = {
        "Checkpoint": bundle.source,
        "Target": bundle.target,
        "Precision": bundle.precision,
        "Size": format_bytes(bundle.size),
        "Max context": f"{bundle.max_context:,} tokens",
        "Digest": bundle.digest,
    }
    where = {
        "Processor": machine.processor,
        "Cores": str(machine.cores),
        "Memory": format_bytes(machine.memory),
        "GPU": machine.gpu,
        "Governor": machine.governor,
        "Power mode": machine.power_mode,
        "Throttled": machine.throttled,
        "Load average": f"{machine.load_average:.2f} at the start",
        **{f"Clock of {name}": _clock(clock) for name, clock in machine.clocks.items()},
        "System": machine.system,
    }
    for device, peaks in result.peaks.items():
        for name, peak, unit in (("Bandwidth", peaks.bandwidth, "B/s"), ("Compute", peaks.compute, "MAC/s")):
            where[f"{name} of {device}"] = None if peak is None else labels.rate(peak, unit)
    lists: dict[str, Mapping[str, str | None]] = {"Bundle": what, "Machine": where, "Versions": machine.versions}
    cards = (element("div", element("h3", name), facts(one), class_="card") for name, one in lists.items())
    return element("div", *cards, class_="charts")


def _clock(rates: Sequence[float]) -> str:
    low, median, high = (labels.rate(rate, "Hz") for rate in rates)
    return f"{median} ({low} to {high})"


def facts(values: Mapping[str, str | None]) -> Markup:
    """Return a definition list of the values that are not None."""
    known = [(name, value) for name, value in values.items() if value is not None]
    return element("dl", *(join([element("dt", name), element("dd", value)]) for name, value in known))


def _command(result: BenchResult) -> Markup:
    made = f"{result.producer}, {result.created}, schema version {result.schema_version}"
    return join(
        [
            element("div", element("h3", "Command"), element("pre", result.command), class_="card"),
            element("footer", made),
        ]
    )
