"""Medians that say how well they are known."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from fusion_edge.benchmarks.latency.result import Summary

CONFIDENCE_Z = 1.96  # 95 %
LARGEST_ERROR = 0.03  # half an interval, as a share of the median
MINIMUM_COUNT = 7  # of independent values: 6 of them miss the median with 3 %


def summarize(values: Sequence[float], rounds: int | None = None) -> Summary:
    """Of at least one value. They were measured in so many rounds, equally many in each, one after the other.

    ``rounds`` of None: each value is a round.
    """
    rounds = len(values) if rounds is None else rounds
    ordered = sorted(values)
    return Summary(
        count=len(ordered),
        least=ordered[0],
        median=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99),
        largest=ordered[-1],
        interval=None if rounds < MINIMUM_COUNT else _median_interval(values, ordered, rounds),
        values=tuple(values),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, interpolated."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _median_interval(values: Sequence[float], ordered: Sequence[float], rounds: int) -> tuple[float, float]:
    """The values between which the median lies with 95 %, whatever their distribution is.

    How many values lie below the median is known to :func:`_deviation`; the values with these ranks are the interval
    (Woodruff, "Confidence intervals for medians and other position measures", J. Am. Stat. Assoc. 47, 1952).
    """
    count = len(values)
    low = max(math.floor((count - 1) / 2 - _deviation(values, percentile(ordered, 0.5), rounds)), 0)
    return ordered[low], ordered[count - 1 - low]


def _deviation(values: Sequence[float], median: float, rounds: int) -> float:
    """How far the number of values below the median may be from a half of them, with 95 %.

    Independent values are binomial. Steps of a round are not independent: they share a state of caches, clocks and
    other programs. There the shares below the median differ more from round to round, which is measured.
    """
    count, size = len(values), len(values) // rounds
    binomial = math.sqrt(count) / 2
    if size == 1:
        return CONFIDENCE_Z * binomial
    below = [sum(value <= median for value in values[i : i + size]) for i in range(0, count, size)]
    between = math.sqrt(rounds) * statistics.stdev(below)
    return _student(rounds - 1) * max(binomial, between)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution (Abramowitz and Stegun 26.7.5); from 6 degrees on within 0.02."""
    z = CONFIDENCE_Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def is_known(summary: Summary) -> bool:
    """Whether the median is known to :data:`LARGEST_ERROR`."""
    return summary.error is not None and summary.error <= LARGEST_ERROR


def repeat(measure: Callable[[], float], seconds: float, warm_up: float = 0.0) -> list[float]:
    """What ``measure`` gives until the median is known or ``seconds`` are over; at least three values.

    Before, it is called once, and again until ``warm_up`` seconds are over.
    """
    end = time.perf_counter() + warm_up
    measure()
    while time.perf_counter() < end:
        measure()
    values: list[float] = []
    end = time.perf_counter() + seconds
    while len(values) < 3 or (time.perf_counter() < end and not is_known(summarize(values))):
        values.append(measure())
    return values


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
