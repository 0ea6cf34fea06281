"""A result as one HTML file that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fusion_edge.benchmarks.latency.report import charts, labels
from fusion_edge.benchmarks.latency.report.case import case_details, legend, time_format, track
from fusion_edge.benchmarks.latency.report.charts import Markup, element, join
from fusion_edge.benchmarks.latency.report.style import CSS
from fusion_edge.benchmarks.latency.result import Case, Measured, Result
from fusion_edge.benchmarks.latency.statistics import LARGEST_ERROR
from fusion_edge.runtime.formatting import format_bytes

_SERIES_KINDS = ("blue", "orange", "green", "pink", "sky", "red", "yellow")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class _Column:
    """Of the table that compares cases."""

    name: str
    value: Callable[[Measured], float]
    text: Callable[[float], str]


_COLUMNS = (
    _Column("First token", lambda measured: measured.first_token.median, labels.duration),
    _Column("Further question", lambda measured: measured.further_first_token.median, labels.duration),
    _Column("Tokens a second", lambda measured: measured.tokens_per_second, labels.three_digits),
    _Column("Peak memory", lambda measured: float(measured.memory.peak), format_bytes),
)


def html_report(result: Result) -> str:
    """The whole file."""
    cases = [measured.case for measured in result.measured]
    title = f"Latency of {result.bundle.source}"
    body = [element("h1", title), _subtitle(result), *_warnings(result)]
    if len(cases) == 1:
        case = element("p", labels.case_name(cases[0]), class_="muted")
        details = case_details(result.measured[0], result)
        body += [element("h2", "Measured"), case, details]
    else:
        body += [element("h2", "Cases side by side"), _comparison(result), _over_context(result)]
        body += [element("h2", "Every case"), *_folded(result)]
    body += [element("h2", "What, where and how"), _facts(result), _command(result)]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(CSS)),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _subtitle(result: Result) -> Markup:
    bundle, machine = result.bundle, result.machine
    where = machine.gpu or machine.processor
    text = f"{bundle.precision} for {bundle.target}, {format_bytes(bundle.size)}, on {where}, {result.created}"
    return element("p", text, class_="muted")


def _warnings(result: Result) -> list[Markup]:
    noisy = sum(measured.is_noisy for measured in result.measured)
    texts = []
    if noisy:
        which = "" if len(result.measured) == 1 else f" in {noisy} of {len(result.measured)} cases"
        texts.append(
            f"The machine was too noisy{which}: some medians are not known to {LARGEST_ERROR:.0%}. Small differences "
            "mean nothing."
        )
    texts += labels.remarks(result)
    if result.machine.throttled:
        texts.append(f"Clocks were held down: {result.machine.throttled}.")
    return [element("p", text, class_="warning") for text in texts]


def _comparison(result: Result) -> Markup:
    cases = [measured.case for measured in result.measured]
    options = labels.differing_options(cases)
    most = [max(map(column.value, result.measured)) for column in _COLUMNS]
    rows = []
    for i, measured in enumerate(result.measured):
        link = element("a", labels.case_name(measured.case, options), href=f"#{_id(i)}")
        cells = [element("th", link, *_badge(measured))]
        for column, largest in zip(_COLUMNS, most, strict=True):
            value = column.value(measured)
            cells.append(element("td", column.text(value), track(value / largest), data_name=column.name))
        rows.append(element("tr", *cells))
    header = element("tr", element("th", "Case"), *(element("th", column.name) for column in _COLUMNS))
    table = element("table", element("thead", header), element("tbody", *rows), class_="cases")
    common = labels.case_name(cases[0], labels.common_options(cases))
    note = [element("p", f"All with {common}.", class_="note muted")] if common else []
    return element("div", table, *note, class_="card")


def _badge(measured: Measured) -> list[str]:
    return [" ", element("span", "too noisy", class_="badge")] if measured.is_noisy else []


def _over_context(result: Result) -> Markup:
    """Steps over context, where cases differ in it."""
    groups: dict[Case, list[Measured]] = {}
    for measured in result.measured:
        groups.setdefault(replace(measured.case, context=0), []).append(measured)
    groups = {case: sorted(group, key=lambda one: one.case.context) for case, group in groups.items() if len(group) > 1}
    if not groups:
        return Markup()
    options = labels.differing_options(list(groups))
    series = [_series(labels.case_name(case, options), group) for case, group in groups.items()]
    kinds = [_SERIES_KINDS[i % len(_SERIES_KINDS)] for i in range(len(series))]
    points = [point for one in series for point in one.points]
    x = charts.Axis(0, 1.05 * max(point[0] for point in points), lambda value: f"{value:,.0f}", "context, positions")
    largest = max(point[3] for point in points)
    y = charts.Axis(0, 1.1 * largest, time_format(largest))
    note = "Median of a step with its 95% interval; dashed: what the memory's bandwidth allows."
    named = [(one.name, kind) for one, kind in zip(series, kinds, strict=True) if one.name]
    return element(
        "figure",
        element("h3", "A step over context"),
        charts.lines(x, y, series, kinds, note),
        legend(named),
        element("figcaption", note),
        class_="card",
        style="margin-top:14px",
    )


def _series(name: str, group: Sequence[Measured]) -> charts.Series:
    points = []
    for measured in group:
        step = measured.stages[labels.STEP]
        low, high = step.interval or (step.median, step.median)
        points.append((float(measured.case.context), low, step.median, high))
    steps = ((float(one.case.context), one.limits.step.seconds) for one in group)
    limits = tuple((context, seconds) for context, seconds in steps if seconds is not None)
    return charts.Series(name, tuple(points), limits)


def _folded(result: Result) -> list[Markup]:
    options = labels.differing_options([measured.case for measured in result.measured])
    parts = []
    for i, measured in enumerate(result.measured):
        figures = (
            f" {labels.duration(measured.first_token.median)} to the first token, "
            f"{labels.three_digits(measured.tokens_per_second)} tokens/s "
        )
        summary = element(
            "summary",
            labels.case_name(measured.case, options),
            element("span", figures, class_="figures"),
            *_badge(measured),
        )
        # A link to what is folded unfolds it, as long as its target is inside.
        target = element("div", case_details(measured, result), id=_id(i))
        parts.append(element("details", summary, target))
    return parts


def _id(i: int) -> str:
    return f"case-{i + 1}"


def _facts(result: Result) -> Markup:
    bundle, machine = result.bundle, result.machine
    what = {
        "Checkpoint": bundle.source,
        "Target": bundle.target,
        "Precision": bundle.precision,
        "Size": format_bytes(bundle.size),
        "Longest context": f"{bundle.max_context:,} positions",
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
        "Load at start": f"{machine.load_average:.2f}",
        **{f"Clock of {name}": _clock(clock) for name, clock in machine.clocks.items()},
        "System": machine.system,
    }
    for device, rates in result.rates.items():
        for name, rate, unit in (("bandwidth", rates.bandwidth, "B/s"), ("products", rates.multiplications, "MAC/s")):
            where[f"Probed {name}, {device}"] = None if rate is None else labels.rate(rate, unit)
    lists: dict[str, Mapping[str, str | None]] = {"Bundle": what, "Machine": where, "Versions": machine.versions}
    cards = (element("div", element("h3", name), _list(facts), class_="card") for name, facts in lists.items())
    return element("div", *cards, class_="charts")


def _clock(rates: Sequence[float]) -> str:
    least, median, largest = (labels.rate(rate, "Hz") for rate in rates)
    return f"{median} ({least} to {largest})"


def _list(facts: Mapping[str, str | None]) -> Markup:
    """Of those that are known."""
    known = [(name, value) for name, value in facts.items() if value is not None]
    return element("dl", *(join([element("dt", name), element("dd", value)]) for name, value in known))


def _command(result: Result) -> Markup:
    made = f"{result.producer}, {result.created}, schema {result.schema_version}"
    return join(
        [
            element("div", element("h3", "Command"), element("pre", result.command), class_="card"),
            element("footer", made),
        ]
    )
