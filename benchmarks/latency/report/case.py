"""One case of a report: headline figures, stages, steps, memory, limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fusion_edge.benchmarks.latency.report import charts, labels
from fusion_edge.benchmarks.latency.report.charts import Markup, element, join
from fusion_edge.benchmarks.latency.result import Limit, Limits, Measured, Memory, Rates, Result, Summary
from fusion_edge.benchmarks.latency.statistics import percentile
from fusion_edge.runtime.formatting import format_bytes

STAGE_KINDS = {
    "image decode": "pink",
    "preprocess": "yellow",
    "vision of the image": "sky",
    "alignment": "green",
    "vision of the question": "blue",
    labels.PREFILL: "orange",
    "sampling": "red",
    labels.OTHER: "grey",
}
"""Colours of the stages to a first token."""
_LARGEST_STEP = 2.5  # times the median: slower steps are counted below the plot, they would flatten the rest
_POINTS = 200  # of a curve; more cannot be seen


def headline(measured: Measured, bundle_size: int) -> Markup:
    """The four figures that are quoted."""
    step, memory, on_gpu = measured.limits.step, measured.memory, measured.device_memory
    device = f", {format_bytes(on_gpu.peak)} on the GPU" if on_gpu is not None else ""
    energy = f", {labels.three_digits(measured.energy.joules_a_token)} J a token" if measured.energy else ""
    cards = [
        (
            "First token",
            labels.duration(measured.first_token.median),
            f"of a new image, {labels.error(measured.first_token)}",
        ),
        (
            "Further question",
            labels.duration(measured.further_first_token.median),
            f"on the same image, {labels.error(measured.further_first_token)}",
        ),
        (
            "Tokens a second",
            labels.three_digits(measured.tokens_per_second),
            (f"{step.share:.0%} of the bandwidth limit" if step.share is not None else "one-token steps") + energy,
        ),
        (
            "Peak memory",
            format_bytes(memory.peak),
            f"{memory.loaded / bundle_size:.2f} × the bundle once loaded{device}",
        ),
    ]
    return element("div", *(_card(*card) for card in cards), class_="headline")


def _card(name: str, value: str, note: str) -> Markup:
    return element(
        "div",
        element("div", name, class_="name"),
        element("div", value, class_="value"),
        element("div", note, class_="note"),
        class_="card",
    )


def case_details(measured: Measured, result: Result) -> Markup:
    """All charts and tables of a case of the result."""
    bundle_size, rates = result.bundle.size, result.rates[measured.case.device]
    step = measured.stages[labels.STEP]
    figures = [
        _step_over_time(step, measured.limits.step),
        _distribution(step),
        *_memory(measured, bundle_size),
        _rates(measured, rates),
    ]
    return join(
        [
            headline(measured, bundle_size),
            _to_first_token(measured),
            element("div", *figures, class_="charts"),
            _stages(measured),
        ]
    )


def _to_first_token(measured: Measured) -> Markup:
    rows = [
        ("First question about an image", labels.first_question(measured), measured.first_token),
        ("Further question about it", labels.further_question(measured), measured.further_first_token),
    ]
    largest = max(sum(seconds for _, seconds in stages) for _, stages, _ in rows)
    limit = measured.limits.prefill.seconds
    parts = [element("h3", "To the first token")]
    for title, stages, total in rows:
        segments = [
            charts.Segment(
                name, seconds, labels.duration(seconds), STAGE_KINDS[name], limit if name == labels.PREFILL else None
            )
            for name, seconds in stages
        ]
        parts.append(element("div", element("span", title), element("b", labels.duration(total.median)), class_="row"))
        label = ", ".join(f"{segment.name} {segment.text}" for segment in segments)
        parts.append(charts.bar(segments, largest, f"{title}: {label}"))
    medians = dict(rows[0][1] + rows[1][1])
    names = [(_stage(name, medians[name]), kind) for name, kind in STAGE_KINDS.items() if name in medians]
    if limit is not None:
        names.append((f"limit of prefill {labels.duration(limit)}", "line"))
    parts.append(legend(names))
    return element("div", *parts, class_="card")


def _stage(name: str, seconds: float) -> str:
    # What is left over takes another time in each question.
    return name if name == labels.OTHER else f"{name} {labels.duration(seconds)}"


def legend(names: Iterable[tuple[str, str]]) -> Markup:
    """Names with the CSS classes of their colours."""
    return element(
        "ul",
        *(element("li", element("span", class_=f"swatch {kind}"), name) for name, kind in names),
        class_="legend",
    )


def _step_over_time(step: Summary, limit: Limit) -> Markup:
    top = min(step.largest, _LARGEST_STEP * step.median)
    y = charts.Axis(0, 1.1 * max(top, limit.seconds or 0), time_format(top))
    x = charts.Axis(0, max(step.count - 1, 1), lambda value: f"{value:,.0f}", "steps, in the order measured")
    marks = [charts.Mark(step.median, f"median {labels.duration(step.median)}", "median")]
    note = ""
    if limit.seconds is not None:
        text = f"limit {labels.duration(limit.seconds)}"
        marks.append(charts.Mark(limit.seconds, text, "limit", is_below=True))
        note = f"The limit is what the memory's bandwidth allows; {limit.share:.0%} of it is reached."
    beyond, slowest = sum(value > y.largest for value in step.values), labels.duration(step.largest)
    if beyond:
        note += f" Above the plot: {beyond} of {step.count:,} steps; the slowest took {slowest}."
    points = _buckets([(float(i), value) for i, value in enumerate(step.values)])
    return _figure("Steps over time", charts.band(x, y, points, marks, note), note)


def _distribution(step: Summary) -> Markup:
    margin = max(0.15 * (step.p99 - step.least), 0.005 * step.median)
    largest = min(step.largest, step.p99 + 2 * margin) + margin / 10
    axis = charts.Axis(step.least - margin / 10, largest, time_format(largest, step.least), "a step takes")
    marks = [
        charts.Mark(step.median, f"median {labels.duration(step.median)}", "median"),
        charts.Mark(step.p90, f"p90 {labels.duration(step.p90)}", "quantile"),
        charts.Mark(step.p99, f"p99 {labels.duration(step.p99)}", "quantile"),
    ]
    beyond = sum(value > axis.largest for value in step.values)
    note = f"{step.count:,} steps from {labels.duration(step.least)} to {labels.duration(step.largest)}"
    note += f". Right of the plot: {beyond}." if beyond else "."
    return _figure("Distribution of a step", charts.histogram(step.values, axis, marks, note), note)


def _memory(measured: Measured, bundle_size: int) -> Iterator[Markup]:
    """Of the process, and of the GPU if there is one."""
    memory = measured.memory
    note = (
        f"Loaded {format_bytes(memory.loaded)} in {labels.duration(measured.load_seconds)}, with up to "
        f"{format_bytes(memory.load_peak)} meanwhile; {format_bytes(memory.steady)} at the end."
    )
    yield _memory_over_time("Memory of the process", memory, bundle_size, note)
    if measured.device_memory is not None:
        device = measured.device_memory
        note = f"Loaded {format_bytes(device.loaded)}; {format_bytes(device.steady)} at the end."
        yield _memory_over_time("Memory of the GPU", device, bundle_size, note)


def _memory_over_time(title: str, memory: Memory, bundle_size: int, note: str) -> Markup:
    points = _buckets([(pair[0], pair[1]) for pair in memory.over_time])
    y = charts.Axis(0, 1.15 * max(memory.peak, bundle_size), lambda value: labels.rate(value, "B"))
    longest = max([1e-3, *(point[0] for point in points)])
    x = charts.Axis(0, longest, time_format(longest), "since the case began")
    marks = [
        charts.Mark(memory.peak, f"peak {format_bytes(memory.peak)}", "quantile"),
        charts.Mark(bundle_size, f"the bundle's size {format_bytes(bundle_size)}", "limit", is_below=True),
    ]
    return _figure(title, charts.band(x, y, points, marks, note), note)


def _rates(measured: Measured, rates: Rates) -> Markup:
    """Shares of the limits, jitter, energy."""
    parts = [element("h3", "Share of the machine's limits"), *_limits(measured.limits, rates)]
    jitter = f"Jitter: a step's 99th percentile is {measured.jitter:.1%} above its median."
    parts.append(element("p", jitter, class_="note"))
    if measured.energy:
        energy = measured.energy
        parts.append(
            element(
                "p",
                f"Energy: {labels.three_digits(energy.joules_a_token)} J a token, "
                f"{labels.three_digits(energy.joules / energy.seconds)} W ({energy.source}, over "
                f"{labels.duration(energy.seconds)}).",
                class_="note",
            )
        )
    return element("div", *parts, class_="card")


def _limits(limits: Limits, rates: Rates) -> list[Markup]:
    products = f"{labels.rate(limits.prefill.needed, 'MAC')} (multiply-adds)"
    reasons = rates.not_measured
    step = f"A step must read {format_bytes(limits.step.needed)}" + _at(limits.step, "B/s", reasons.get("bandwidth"))
    prefill = f"Prefill needs {products}" + _at(limits.prefill, "MAC/s", reasons.get("multiplications"))
    return [
        _meter("Decode, of the memory's bandwidth", limits.step.share, step),
        _meter("Prefill, of the rate of products", limits.prefill.share, prefill),
    ]


def _at(limit: Limit, unit: str, reason: str | None) -> str:
    if limit.seconds is None:
        return f". {reason}"
    return f": {labels.duration(limit.seconds)} at the probed {labels.rate(limit.needed / limit.seconds, unit)}."


def _meter(name: str, share: float | None, note: str) -> Markup:
    value = "not measured" if share is None else f"{share:.0%}"
    return element(
        "div",
        element("div", element("span", name), element("b", value), class_="row"),
        track(share or 0),
        element("p", note, class_="note muted"),
        class_="meter",
    )


def track(share: float) -> Markup:
    """A bar for a share of 1."""
    return element("div", element("div", style=f"width:{100 * min(share, 1):.1f}%"), class_="track")


def _stages(measured: Measured) -> Markup:
    names = ("median", "error", "min", "p90", "p99", "max", "times")
    rows = []
    for name, one in labels.measures(measured).items():
        times = [labels.duration(value) for value in (one.median, one.least, one.p90, one.p99, one.largest)]
        cells = [times[0], labels.error(one), *times[1:], f"{one.count:,}"]
        named = zip(names, cells, strict=True)
        rows.append(element("tr", element("th", name), *(element("td", cell, data_name=head) for head, cell in named)))
    header = element("tr", element("th", "Stage"), *(element("th", name) for name in names))
    table = element("table", element("thead", header), element("tbody", *rows), class_="stages")
    return element("div", element("h3", "All that was timed"), table, class_="card")


def _figure(title: str, chart: Markup, note: str) -> Markup:
    return element("figure", element("h3", title), chart, element("figcaption", note), class_="card")


def time_format(largest: float, least: float = 0.0) -> charts.Format:
    """Ticks between two times, all in the unit of the larger one."""
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)) if largest >= f)
    spread = (largest - least) / factor
    decimals = 0 if spread >= 10 else 1 if spread >= 1 else 2 if spread >= 0.1 else 3
    return lambda value: f"{value / factor:,.{decimals}f} {unit}"


def _buckets(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """At most :data:`_POINTS` of (x, least, median, largest)."""
    size = -(-len(points) // _POINTS) or 1
    buckets = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = sorted(value for _, value in bucket)
        buckets.append((bucket[len(bucket) // 2][0], values[0], percentile(values, 0.5), values[-1]))
    return buckets
