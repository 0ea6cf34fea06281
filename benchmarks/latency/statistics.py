"""Medians with confidence intervals, and loops that repeat until a median is precise."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CONFIDENCE_Z = 1.96  # 95%
TARGET_ERROR = 0.03
"""Half a confidence interval over the median at which a median counts as precise."""
MIN_ROUNDS = 7
"""Smallest number of independent values with a 95% interval: six values miss their median with 3%."""


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one quantity."""

    count: int
    min: float
    p50: float
    p95: float
    p99: float
    max: float
    ci95: tuple[float, ...] | None
    """95% confidence interval of ``p50`` from order statistics, corrected for values that share a round. None with
    fewer than seven rounds."""
    values: tuple[float, ...]
    """Every value, in the order of measurement."""

    @property
    def error(self) -> float | None:
        """Half the confidence interval over the median; None without an interval."""
        if self.ci95 is None:
            return None
        low, high = self.ci95
        return (high - low) / 2 / self.p50 if self.p50 else 0.0

    @property
    def is_precise(self) -> bool:
        """Return whether the error is at most :data:`TARGET_ERROR`."""
        return self.error is not None and self.error <= TARGET_ERROR


def summarize(values: Sequence[float], rounds: int | None = None) -> Summary:
    """Summarize at least one value.

    ``rounds``: number of rounds that measured the values, each the same number of consecutive ones. None: each value
    is a round.
    """
    rounds = len(values) if rounds is None else rounds
    ordered = sorted(values)
    return Summary(
        count=len(ordered),
        min=ordered[0],
        p50=percentile(ordered, 0.5),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
        max=ordered[-1],
        ci95=None if rounds < MIN_ROUNDS else _median_interval(values, ordered, rounds),
        values=tuple(values),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return a percentile of ascending values, interpolated; ``share`` is in [0, 1]."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _median_interval(values: Sequence[float], ordered: Sequence[float], rounds: int) -> tuple[float, float]:
    """Return the 95% confidence interval of the median, for any distribution.

    The interval's ends are the values at the ranks that :func:`_rank_deviation` allows (Woodruff, "Confidence
    intervals for medians and other position measures", J. Am. Stat. Assoc. 47, 1952).
    """
    count = len(values)
    low = max(math.floor((count - 1) / 2 - _rank_deviation(values, percentile(ordered, 0.5), rounds)), 0)
    return ordered[low], ordered[count - 1 - low]


def _rank_deviation(values: Sequence[float], median: float, rounds: int) -> float:
    """Return how far the number of values below the true median is from one half, with 95% confidence.

    Independent values follow a binomial distribution. Decode steps of one round are not independent: they share
    caches, clocks and other processes. Their spread between rounds is measured.
    """
    count, size = len(values), len(values) // rounds
    binomial = math.sqrt(count) / 2
    if size == 1:
        return CONFIDENCE_Z * binomial
    below = [sum(value <= median for value in values[i : i + size]) for i in range(0, count, size)]
    between = math.sqrt(rounds) * statistics.stdev(below)
    return _student_quantile(rounds - 1) * max(binomial, between)


def _student_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t, within 0.02 from 6 degrees of freedom (Abramowitz, Stegun 26.7.5)."""
    z = CONFIDENCE_Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def repeat(measure: Callable[[], float], seconds: float, warm_up: float = 0.0) -> list[float]:
    """Return values of ``measure``, at least three, until their median is precise or ``seconds`` are over.

    The first call and all calls within ``warm_up`` seconds do not count.
    """
    end = time.perf_counter() + warm_up
    measure()
    while time.perf_counter() < end:
        measure()
    values: list[float] = []
    end = time.perf_counter() + seconds
    while len(values) < 3 or (time.perf_counter() < end and not summarize(values).is_precise):
        values.append(measure())
    return values


def timed(action: Callable[[], object]) -> float:
    """Run an action and return its seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
