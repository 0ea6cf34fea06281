"""Medians that say how well they are known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from fusion_edge.benchmarks.latency.result import Summary

CONFIDENCE_Z = 1.96  # 95 %
LARGEST_ERROR = 0.03  # half an interval, as a share of the median
MINIMUM_COUNT = 7  # fewer values have no interval: 6 of them miss the median with 3 %


def summarize(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    ordered = sorted(values)
    return Summary(
        count=len(ordered),
        least=ordered[0],
        median=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99),
        largest=ordered[-1],
        interval=_median_interval(ordered),
        values=tuple(values),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, interpolated."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The values between which the median lies with 95 %: by the binomial distribution, whatever theirs is."""
    count = len(ordered)
    reach = CONFIDENCE_Z * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
    return ordered[max(low, 0)], ordered[min(high, count - 1)]


def is_known(values: Sequence[float]) -> bool:
    """Whether the median of the values is known to :data:`LARGEST_ERROR`."""
    return len(values) >= MINIMUM_COUNT and summarize(values).error <= LARGEST_ERROR


def repeat(action: Callable[[], object], seconds: float, warm_up: int = 1) -> list[float]:
    """Seconds of each run, until their median is known or ``seconds`` are over; at least three."""
    for _ in range(warm_up):
        action()
    values: list[float] = []
    end = time.perf_counter() + seconds
    while len(values) < 3 or (time.perf_counter() < end and not is_known(values)):
        values.append(timed(action))
    return values


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
