"""One case in the HTML report: headline figures, stages, decode steps, memory and rooflines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fusion_edge.benchmarks.latency.machine.memory import MemoryUse
from fusion_edge.benchmarks.latency.report import charts, labels
from fusion_edge.benchmarks.latency.report.charts import Markup, element, join
from fusion_edge.benchmarks.latency.result import IMAGE_DECODE, BenchResult, CaseResult, Peaks, RooflineUse, Utilization
from fusion_edge.benchmarks.latency.statistics import Summary, percentile
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.stages import (
    ALIGNMENT,
    DECODE_STEP,
    ENCODE_GLOBAL,
    ENCODE_LOCAL,
    PREFILL,
    PREPROCESS,
    SAMPLING,
)

STAGE_COLORS = {
    IMAGE_DECODE: "pink",
    PREPROCESS: "yellow",
    ENCODE_GLOBAL: "sky",
    ALIGNMENT: "green",
    ENCODE_LOCAL: "blue",
    PREFILL: "orange",
    SAMPLING: "red",
    labels.OTHER: "gray",
}
"""CSS classes of the stages up to the first token."""
_PLOT_TOP = 2.5  # times the median; slower decode steps are counted below the plot instead of flattening it
_MAX_POINTS = 200  # of a curve


def headline(result: CaseResult, bundle_size: int) -> Markup:
    """Return the four headline figures."""
    decode, memory, on_gpu = result.roofline.decode, result.memory, result.device_memory
    device = f", {format_bytes(on_gpu.peak)} on the GPU" if on_gpu is not None else ""
    energy = f", {labels.three_digits(result.energy.joules_per_token)} J per token" if result.energy else ""
    share = f"{decode.share:.0%} of the bandwidth roofline" if decode.share is not None else "one token per step"
    cards = [
        ("Time to first token", labels.duration(result.ttft.p50), f"new image, {labels.error(result.ttft)}"),
        (
            "Follow-up TTFT",
            labels.duration(result.followup_ttft.p50),
            f"same image, {labels.error(result.followup_ttft)}",
        ),
        ("Decode tokens/s", labels.three_digits(result.decode_tokens_per_second), share + energy),
        (
            "Peak memory",
            format_bytes(memory.peak),
            f"{memory.loaded / bundle_size:.2f} × the bundle after loading{device}",
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


def case_details(one: CaseResult, result: BenchResult) -> Markup:
    """Return all charts and tables of a case."""
    bundle_size, peaks = result.bundle.size, result.peaks[one.case.device]
    step = one.stages[DECODE_STEP]
    figures = [
        _steps_over_time(step, one.roofline.decode),
        _distribution(step),
        *_memory(one, bundle_size),
        _rooflines(one, peaks),
    ]
    return join(
        [headline(one, bundle_size), _to_first_token(one), element("div", *figures, class_="charts"), _stages(one)]
    )


def _to_first_token(result: CaseResult) -> Markup:
    rows = [
        ("First question about an image", labels.first_question(result), result.ttft),
        ("Follow-up question about the same image", labels.followup_question(result), result.followup_ttft),
    ]
    largest = max(sum(seconds for _, seconds in stages) for _, stages, _ in rows)
    roofline = result.roofline.prefill.roofline_seconds
    parts = [element("h3", "Time to first token")]
    for title, stages, total in rows:
        segments = [
            charts.Segment(
                name, seconds, labels.duration(seconds), STAGE_COLORS[name], roofline if name == PREFILL else None
            )
            for name, seconds in stages
        ]
        parts.append(element("div", element("span", title), element("b", labels.duration(total.p50)), class_="row"))
        label = ", ".join(f"{segment.name} {segment.text}" for segment in segments)
        parts.append(charts.bar(segments, largest, f"{title}: {label}"))
    medians = dict(rows[0][1] + rows[1][1])
    names = [(_stage(name, medians[name]), color) for name, color in STAGE_COLORS.items() if name in medians]
    if roofline is not None:
        names.append((f"prefill at the roofline {labels.duration(roofline)}", "line"))
    parts.append(legend(names))
    return element("div", *parts, class_="card")


def _stage(name: str, seconds: float) -> str:
    # The rest differs between the two questions.
    return name if name == labels.OTHER else f"{name} {labels.duration(seconds)}"


def legend(names: Iterable[tuple[str, str]]) -> Markup:
    """Return a legend of names with the CSS classes of their colors."""
    return element(
        "ul",
        *(element("li", element("span", class_=f"swatch {color}"), name) for name, color in names),
        class_="legend",
    )


def _steps_over_time(step: Summary, use: Utilization) -> Markup:
    top = min(step.max, _PLOT_TOP * step.p50)
    y = charts.Axis(0, 1.1 * max(top, use.roofline_seconds or 0), time_format(top))
    x = charts.Axis(0, max(step.count - 1, 1), lambda value: f"{value:,.0f}", "decode step")
    median_is_lower = use.roofline_seconds is not None and use.roofline_seconds > step.p50
    marks = [charts.Mark(step.p50, f"median {labels.duration(step.p50)}", "median", is_below=median_is_lower)]
    note = ""
    if use.roofline_seconds is not None:
        text = f"roofline {labels.duration(use.roofline_seconds)}"
        marks.append(charts.Mark(use.roofline_seconds, text, "roofline", is_below=not median_is_lower))
        note = f"Decode reaches {use.share:.0%} of the bandwidth roofline."
    beyond, slowest = sum(value > y.high for value in step.values), labels.duration(step.max)
    if beyond:
        note += f" Above the plot: {beyond} of {step.count:,} steps, the slowest {slowest}."
    points = _buckets([(float(i), value) for i, value in enumerate(step.values)])
    return _figure("Decode steps over time", charts.band(x, y, points, marks, note), note)


def _distribution(step: Summary) -> Markup:
    margin = max(0.15 * (step.p99 - step.min), 0.005 * step.p50)
    high = min(step.max, step.p99 + 2 * margin) + margin / 10
    axis = charts.Axis(step.min - margin / 10, high, time_format(high, step.min), "time per decode step")
    marks = [
        charts.Mark(step.p50, f"median {labels.duration(step.p50)}", "median"),
        charts.Mark(step.p95, f"p95 {labels.duration(step.p95)}", "percentile"),
        charts.Mark(step.p99, f"p99 {labels.duration(step.p99)}", "percentile"),
    ]
    beyond = sum(value > axis.high for value in step.values)
    note = f"{step.count:,} steps from {labels.duration(step.min)} to {labels.duration(step.max)}"
    note += f". Right of the plot: {beyond}." if beyond else "."
    return _figure("Distribution of decode steps", charts.histogram(step.values, axis, marks, note), note)


def _memory(result: CaseResult, bundle_size: int) -> Iterator[Markup]:
    memory = result.memory
    note = (
        f"{format_bytes(memory.loaded)} after a load of {labels.duration(result.load_seconds)} (peak "
        f"{format_bytes(memory.load_peak)}); {format_bytes(memory.steady)} at the end."
    )
    yield _memory_over_time("Memory of the process", memory, bundle_size, note)
    if result.device_memory is not None:
        device = result.device_memory
        note = f"{format_bytes(device.loaded)} after loading; {format_bytes(device.steady)} at the end."
        yield _memory_over_time("Memory of the GPU", device, bundle_size, note)


def _memory_over_time(title: str, memory: MemoryUse, bundle_size: int, note: str) -> Markup:
    points = _buckets([(pair[0], pair[1]) for pair in memory.over_time])
    y = charts.Axis(0, 1.15 * max(memory.peak, bundle_size), lambda value: labels.rate(value, "B"))
    longest = max([1e-3, *(point[0] for point in points)])
    x = charts.Axis(0, longest, time_format(longest), "time since the start of the case")
    marks = [
        charts.Mark(memory.peak, f"peak {format_bytes(memory.peak)}", "percentile"),
        charts.Mark(bundle_size, f"bundle {format_bytes(bundle_size)}", "roofline", is_below=True),
    ]
    return _figure(title, charts.band(x, y, points, marks, note), note)


def _rooflines(result: CaseResult, peaks: Peaks) -> Markup:
    parts = [element("h3", "Share of the roofline"), *_meters(result.roofline, peaks)]
    jitter = f"Jitter: the 99th percentile of a decode step is {result.jitter:.1%} above the median."
    parts.append(element("p", jitter, class_="note"))
    if result.energy:
        energy = result.energy
        parts.append(
            element(
                "p",
                f"Energy: {labels.three_digits(energy.joules_per_token)} J per token, "
                f"{labels.three_digits(energy.joules / energy.seconds)} W ({energy.source}, over "
                f"{labels.duration(energy.seconds)}).",
                class_="note",
            )
        )
    return element("div", *parts, class_="card")


def _meters(use: RooflineUse, peaks: Peaks) -> list[Markup]:
    reasons = peaks.not_measured
    decode = f"A decode step reads {format_bytes(use.decode.work)}"
    prefill = f"Prefill needs {labels.rate(use.prefill.work, 'MAC')} (multiply-adds)"
    return [
        _meter("Decode, of the memory bandwidth", use.decode, decode, "B/s", reasons.get("bandwidth")),
        _meter("Prefill, of the compute throughput", use.prefill, prefill, "MAC/s", reasons.get("compute")),
    ]


def _meter(name: str, use: Utilization, work: str, unit: str, reason: str | None) -> Markup:
    if use.roofline_seconds is None:
        value, note = "not measured", f"{work}. {reason}"
    else:
        peak = labels.rate(use.work / use.roofline_seconds, unit)
        value, note = f"{use.share:.0%}", f"{work}: {labels.duration(use.roofline_seconds)} at {peak}."
    return element(
        "div",
        element("div", element("span", name), element("b", value), class_="row"),
        track(use.share or 0),
        element("p", note, class_="note muted"),
        class_="meter",
    )


def track(share: float) -> Markup:
    """Return a bar filled to a share of 1."""
    return element("div", element("div", style=f"width:{100 * min(share, 1):.1f}%"), class_="track")


def _stages(result: CaseResult) -> Markup:
    names = ("p50", "error", "min", "p95", "p99", "max", "count")
    rows = []
    for name, one in labels.measures(result).items():
        times = [labels.duration(value) for value in (one.p50, one.min, one.p95, one.p99, one.max)]
        cells = [times[0], labels.error(one), *times[1:], f"{one.count:,}"]
        named = zip(names, cells, strict=True)
        rows.append(element("tr", element("th", name), *(element("td", cell, data_name=head) for head, cell in named)))
    header = element("tr", element("th", "Stage"), *(element("th", name) for name in names))
    table = element("table", element("thead", header), element("tbody", *rows), class_="stages")
    return element("div", element("h3", "All stages"), table, class_="card")


def _figure(title: str, chart: Markup, note: str) -> Markup:
    return element("figure", element("h3", title), chart, element("figcaption", note), class_="card")


def time_format(high: float, low: float = 0.0) -> charts.Format:
    """Return a formatter for ticks between two times, in the unit of the larger one."""
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)) if high >= f)
    spread = (high - low) / factor
    decimals = 0 if spread >= 10 else 1 if spread >= 1 else 2 if spread >= 0.1 else 3
    return lambda value: f"{value / factor:,.{decimals}f} {unit}"


def _buckets(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Reduce points to at most :data:`_MAX_POINTS` of (x, min, median, max)."""
    size = -(-len(points) // _MAX_POINTS) or 1
    buckets = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = sorted(value for _, value in bucket)
        buckets.append((bucket[len(bucket) // 2][0], values[0], percentile(values, 0.5), values[-1]))
    return buckets
