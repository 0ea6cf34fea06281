"""A result as one self-contained HTML file: no script, no network, pictures as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from fusion_edge.benchmarks.evaluation.report import rows, style
from fusion_edge.benchmarks.evaluation.result import CaseResult, EvalResult, Percentiles
from fusion_edge.benchmarks.evaluation.summary import worst
from fusion_edge.benchmarks.latency.report.case import track
from fusion_edge.benchmarks.latency.report.charts import Markup, element, join
from fusion_edge.benchmarks.latency.report.page import document, facts
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.images.preprocessing import load_image

MOST_CASES = 24
PICTURE_SIDE = 320
"""Longest side of a picture in the page, in pixels."""


def html_report(result: EvalResult) -> str:
    """Return the whole file. Reads the images of the worst cases again."""
    title = f"Accuracy of {result.model.source}"
    body = [
        element("h1", title),
        element("p", f"{rows.model_name(result.model)}, {result.created}. {rows.asked(result)}.", class_="muted"),
        _headline(result),
        element("div", _shares(result), _calibration(result), class_="two"),
        element("h2", "Latency"),
        element("div", *(_latency(name, one) for name, one in rows.latencies(result).items()), class_="two"),
        *_worst(result),
        element("h2", "Setup"),
        _setup(result),
        element("div", element("h3", "Command"), element("pre", result.command), class_="card"),
        element("footer", f"{result.producer}, {result.created}, schema version {result.schema_version}"),
    ]
    return document(title, body, style.CSS)


def _headline(result: EvalResult) -> Markup:
    judged = result.accuracy[result.judged_by]
    cards = [
        ("Accuracy", rows.percent(judged.share), f"{result.judged_by}, {rows.interval(judged)}"),
        ("Calibration error", rows.percent(result.calibration.error), "confidence against accuracy"),
    ]
    if (comparison := result.comparison) is not None:
        same = comparison.same_answer
        cards.append(("Same answer", rows.percent(same.share), "as the reference"))
        note = f"nats, {comparison.kl_per_position:.2g} per position"
        cards.append(("KL, first token", f"{comparison.kl_first_token:.2g}", note))
    return element("div", *(_card(*card) for card in cards), class_="headline")


def _card(name: str, value: str, note: str) -> Markup:
    parts = (("name", name), ("value", value), ("note", note))
    return element("div", *(element("div", text, class_=kind) for kind, text in parts), class_="card")


def _shares(result: EvalResult) -> Markup:
    header = ["", "share", "95% interval", "count"]
    lines = [
        [name, rows.percent(share.share), rows.interval(share), f"{share.count:,} of {share.total:,}"]
        for name, share in rows.shares(result).items()
    ]
    figures = facts(rows.figures(result))
    return element("div", element("h3", "Answers"), _table(header, lines), figures, class_="card")


def _calibration(result: EvalResult) -> Markup:
    lines = [
        [
            f"{rows.percent(one.low)} to {rows.percent(one.high)}",
            f"{one.count:,}",
            rows.percent(one.confidence),
            rows.percent(one.accuracy),
        ]
        for one in result.calibration.bins
    ]
    note = f"Share of right answers ({result.judged_by}) among those of similar confidence."
    parts = [
        element("h3", "Confidence"),
        _table(["confidence", "answers", "mean", "accuracy"], lines),
        element("p", note, class_="note muted"),
    ]
    return element("div", *parts, class_="card")


def _latency(name: str, stages: Mapping[str, Percentiles]) -> Markup:
    header = ["stage", "p50", "p95", "p99", "count"]
    lines = [[stage, *rows.times(one)] for stage, one in stages.items()]
    return element("div", element("h3", name), _table(header, lines), class_="card")


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Markup:
    body = [
        element(
            "tr",
            element("th", line[0]),
            *(element("td", cell, data_name=name) for name, cell in zip(header[1:], line[1:], strict=True)),
        )
        for line in lines
    ]
    head = element("tr", *(element("th", name) for name in header))
    return element("table", element("thead", head), element("tbody", *body), class_="shares")


def _worst(result: EvalResult) -> list[Markup]:
    cases = worst(result.cases, result.judged_by, MOST_CASES)
    wrong = sum(not case.is_right[result.judged_by] for case in result.cases)
    if not cases:
        return [element("h2", "Worst cases"), element("p", "Every answer is right.", class_="muted")]
    note = f"{wrong:,} of {len(result.cases):,} answers are wrong ({result.judged_by}); the most confident come first."
    if result.comparison is not None:
        note += " Right answers follow by their largest KL divergence from the reference."
    parts = [element("h2", "Worst cases"), element("p", note, class_="muted")]
    return [*parts, element("div", *(_case(number, case, result) for number, case in cases), class_="worst")]


def _case(number: int, case: CaseResult, result: EvalResult) -> Markup:
    answer = element("span", case.answer or "(nothing)", class_="" if case.is_right[result.judged_by] else "wrong")
    entries: list[tuple[str, str]] = [("Question", case.question), ("Expected", case.expected), ("Answer", answer)]
    notes = [f"sample {number + 1}"]
    if case.comparison is not None:
        entries.append(("Reference", case.comparison.answer))
        notes.append(f"KL {max(case.comparison.kl_divergences):.2g} nats")
    if case.finish_reason != "stop":
        notes.append(f"ended by {case.finish_reason}")
    listed = join(join([element("dt", name), element("dd", value)]) for name, value in entries)
    confidence = []
    if case.confidence is not None:
        notes.append(f"confidence {rows.percent(case.confidence)}")
        confidence = [track(case.confidence)]
    parts = [_picture(Path(case.image)), element("dl", listed), *confidence]
    return element("div", *parts, element("p", ", ".join(notes), class_="note muted"), class_="card")


def _picture(path: Path) -> Markup:
    try:
        picture = load_image(path)
    except FusionError:  # deleted since it was asked about
        return element("p", f"{path.name} is gone", class_="muted")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=85)
    data = base64.b64encode(encoded.getvalue()).decode("ascii")
    return element("img", src=f"data:image/jpeg;base64,{data}", alt=path.name, loading="lazy")


def _setup(result: EvalResult) -> Markup:
    settings, machine, model = result.settings, result.machine, result.model
    asked: dict[str, str | None] = {
        "Samples": f"{len(result.cases):,} of {result.data}",
        "Image tokens": str(settings.image_tokens),
        "Latents": str(settings.query_length),
        "New tokens": f"at most {settings.max_new_tokens}",
        "Guide": None if settings.guide is None else repr(settings.guide),
        "Choices": ", ".join(settings.choices) or None,
        "Deadline": None if settings.deadline is None else f"{settings.deadline:g} s",
    }
    where: dict[str, str | None] = {
        "Device": model.device,
        "Processor": machine.processor,
        "Cores": str(machine.cores),
        "Memory": format_bytes(machine.memory),
        "GPU": machine.gpu,
        "Load average": f"{machine.load_average:.2f} at the start",
        "System": machine.system,
        **machine.versions,
    }
    named = {"Questions": asked, "Machine": where}
    cards = (element("div", element("h3", name), facts(one), class_="card") for name, one in named.items())
    return element("div", *cards, class_="charts")
