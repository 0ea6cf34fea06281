"""Escaped markup, and charts as inline SVG.

Charts scale with their container, text keeps its size, and colors are CSS classes, so a chart is readable on a phone
and on a desktop.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_GRID = 1000
"""Side of the square in which paths are drawn before they are stretched over the plot."""

_VOID = frozenset({"img", "link", "meta"})
Format = Callable[[float], str]


class Markup(str):
    """Text that needs no escaping."""


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """Return ``<tag attributes>children</tag>`` with attributes and plain-text children escaped.

    An underscore in an attribute's name becomes a hyphen; a trailing one is dropped (``class_``).
    """
    names = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    opening = "".join([tag, *(f' {name}="{html.escape(str(value))}"' for name, value in names)])
    return Markup(f"<{opening}>" if tag in _VOID else f"<{opening}>{join(children)}</{tag}>")


def join(parts: Iterable[str]) -> Markup:
    """Concatenate markup and escaped text."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part, quote=False) for part in parts))


@dataclass(frozen=True)
class Axis:
    """Linear axis from ``low`` to ``high``."""

    low: float
    high: float
    text: Format
    name: str = ""

    def share(self, value: float) -> float:
        """Return the position of a value on the axis: 0 at ``low``, 1 at ``high``."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """Return round values on the axis, 1, 2 or 5 times a power of ten apart, with their texts."""
        width = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(width))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * width)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(i * step, self.text(i * step) if i else "0") for i in range(first, last + 1)]


@dataclass(frozen=True)
class Mark:
    """Labeled line across a plot."""

    value: float
    label: str
    kind: str
    """CSS class."""
    is_below: bool = False
    """Whether the label of a horizontal line is below it, if there is room."""


@dataclass(frozen=True)
class Series:
    """Points with intervals on a line, and their roofline."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    """x, low, middle, high."""
    roofline: tuple[tuple[float, float], ...]
    """x, y."""


@dataclass(frozen=True)
class Segment:
    """Segment of a stacked bar."""

    name: str
    value: float
    text: str
    kind: str
    roofline: float | None = None
    """Value at the roofline."""


def bar(segments: Sequence[Segment], largest: float, label: str) -> Markup:
    """Return a stacked bar; ``largest`` fills the width. A segment's roofline is a line along its foot."""
    parts: list[Markup] = []
    start = 0.0
    for segment in segments:
        x, width = _percent(start / largest), _percent(segment.value / largest)
        title = element("title", f"{segment.name}: {segment.text}")
        parts.append(element("rect", title, x=x, width=width, height="100%", class_=f"segment {segment.kind}"))
        if segment.value / largest > 0.17:  # the text fits, even on a phone
            middle = _percent((start + segment.value / 2) / largest)
            text_kind = f"inside on-{segment.kind}"
            parts.append(element("text", segment.text, x=middle, y="50%", dy=".35em", class_=text_kind))
        if segment.roofline is not None:
            reached = _percent(min(segment.roofline, segment.value) / largest)
            parts.append(element("rect", x=x, y="86%", width=reached, height="14%", class_="foot"))
        start += segment.value
    return _svg("bar", label, parts)


def histogram(values: Sequence[float], axis: Axis, marks: Sequence[Mark], label: str) -> Markup:
    """Return a histogram; marks are vertical lines with their labels in rows above."""
    bins = min(max(round(2 * len(values) ** (1 / 3)), 6), 40)
    counts = [0] * bins
    for share in map(axis.share, values):
        if 0 <= share <= 1:
            counts[min(int(share * bins), bins - 1)] += 1
    parts = [*_x_axis(axis)]
    for i, count in enumerate(counts):
        height = count / max(*counts, 1)
        place = {"x": _percent(i / bins), "width": _percent(1 / bins)}
        title = element("title", str(count))
        parts.append(element("rect", title, y=_percent(1 - height), height=_percent(height), class_="column", **place))
    for row, mark in enumerate(marks):
        share = axis.share(mark.value)
        x, y = _percent(share), 14 * (row - len(marks)) + 8
        anchor, dx = ("end", -4) if share > 0.55 else ("start", 4)
        parts.append(element("line", x1=x, x2=x, y1=y - 10, y2="100%", class_=mark.kind))
        parts.append(element("text", mark.label, x=x, y=y, dx=dx, text_anchor=anchor, class_=f"label {mark.kind}"))
    return element("div", _plot(label, parts), style=f"padding-top:{14 * len(marks)}px")


def band(
    x: Axis, y: Axis, points: Sequence[tuple[float, float, float, float]], marks: Sequence[Mark], label: str
) -> Markup:
    """Return a line through (x, low, middle, high) over the area from low to high; marks are horizontal lines."""
    outline = [(x.share(p[0]), y.share(p[1])) for p in points] + [(x.share(p[0]), y.share(p[3])) for p in points[::-1]]
    shapes = [
        element("path", d=_path(outline) + "Z", class_="area"),
        element("path", d=_path([(x.share(p[0]), y.share(p[2])) for p in points]), class_="curve"),
    ]
    parts = [*_y_axis(y), *_x_axis(x), _stretched(shapes)]
    for mark in marks:
        height = _percent(1 - y.share(mark.value))
        parts.append(element("line", x1=0, x2="100%", y1=height, y2=height, class_=mark.kind))
        dy = "1.2em" if mark.is_below and y.share(mark.value) > 0.12 else "-.4em"
        parts.append(
            element("text", mark.label, x="100%", y=height, dy=dy, text_anchor="end", class_=f"label {mark.kind}")
        )
    return _plot(label, parts)


def lines(x: Axis, y: Axis, series: Sequence[Series], kinds: Sequence[str], label: str) -> Markup:
    """Return a line with points and intervals per series in its CSS class, and its roofline as a dashed line."""
    parts = [*_y_axis(y), *_x_axis(x)]
    for i, (one, kind) in enumerate(zip(series, kinds, strict=True)):
        radius = 3 + 2.5 * (i % 4)  # concentric rings for points that coincide
        curve = [(x.share(at), y.share(middle)) for at, _, middle, _ in one.points]
        roofline = [(x.share(at), y.share(value)) for at, value in one.roofline]
        parts.append(
            _stretched(
                [
                    element("path", d=_path(curve), class_=f"curve {kind}"),
                    element("path", d=_path(roofline), class_=f"curve dashed {kind}"),
                ]
            )
        )
        for at, low, middle, high in one.points:
            place = _percent(x.share(at))
            ends = {"y1": _percent(1 - y.share(low)), "y2": _percent(1 - y.share(high))}
            title = element("title", f"{one.name}: {y.text(middle)} at {x.text(at)}")
            parts.append(element("line", x1=place, x2=place, class_=f"whisker {kind}", **ends))
            center = _percent(1 - y.share(middle))
            parts.append(element("circle", title, cx=place, cy=center, r=radius, class_=f"ring {kind}"))
    return _plot(label, parts)


def _x_axis(axis: Axis) -> list[Markup]:
    parts = [element("line", x1=0, x2="100%", y1="100%", y2="100%", class_="axis")]
    for value, text in axis.ticks(about=4):
        x = _percent(axis.share(value))
        parts.append(element("text", text, x=x, y="100%", dy="1.5em", text_anchor="middle", class_="tick"))
    if axis.name:
        parts.append(element("text", axis.name, x="100%", y="100%", dy="3em", text_anchor="end", class_="tick"))
    return parts


def _y_axis(axis: Axis) -> list[Markup]:
    parts = []
    for value, text in axis.ticks(about=5):
        y = _percent(1 - axis.share(value))
        parts.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(element("text", text, x=-6, y=y, dy=".35em", text_anchor="end", class_="tick"))
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{x * _GRID:.1f},{(1 - y) * _GRID:.1f}" for x, y in points)


def _stretched(shapes: Sequence[Markup]) -> Markup:
    """Stretch paths over the plot: SVG paths have no percentages, so they are drawn in a square."""
    box = f"0 0 {_GRID} {_GRID}"
    return element("svg", *shapes, viewBox=box, preserveAspectRatio="none", width="100%", height="100%")


def _plot(label: str, parts: Sequence[Markup]) -> Markup:
    return element("div", _svg("plot", label, parts), class_="frame")


def _svg(kind: str, label: str, parts: Sequence[Markup]) -> Markup:
    return element("svg", join(parts), class_=kind, role="img", aria_label=label)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
