"""How long requests took, and how they ended."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["answered", "late", "dropped", "superseded", "cancelled", "failed"]
"""How a request ended. Every request ends in one of these ways."""

WINDOW = 1000
"""Latest answers that the percentiles cover."""


@dataclass(frozen=True)
class Percentiles:
    """Percentiles in milliseconds; NaN without an answer."""

    p50: float
    p95: float
    p99: float

    def __str__(self) -> str:
        return f"{self.p50:.0f}/{self.p95:.0f}/{self.p99:.0f} ms"


@dataclass(frozen=True)
class Latencies:
    """Latencies of an :class:`Asker`'s latest 1,000 answers, and the number of its requests by how they ended.

    Requests that were answered without a run (``skip_unchanged``) count in :attr:`answered` and :attr:`unchanged`, but
    not in the percentiles.
    """

    wait_ms: Percentiles
    """From ``submit`` to the start of the run."""
    first_token_ms: Percentiles
    """From ``submit`` to the first piece of text; requests without pieces do not count."""
    total_ms: Percentiles
    """From ``submit`` to the complete answer."""
    answered: int
    """Answered within their deadline."""
    unchanged: int
    """Answered with the last answer, because the frame was the same. Part of :attr:`answered`."""
    late: int
    """Ended by their deadline, with or without a partial answer."""
    dropped: int
    """Left a full queue, or were refused by one."""
    superseded: int
    """Replaced by a newer frame."""
    cancelled: int
    """Ended by ``cancel`` or ``close``."""
    failed: int
    """Ended by any other error."""

    def __str__(self) -> str:
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int) and value}
        times = f"wait {self.wait_ms}, first token {self.first_token_ms}, total {self.total_ms} (p50/p95/p99)"
        return ", ".join([times, *(f"{value} {name}" for name, value in counts.items())])


class LatencyRecorder:
    """Collects what :class:`Latencies` shows. One thread at a time."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._waits, self._firsts, self._totals = (deque[float](maxlen=WINDOW) for _ in range(3))

    def count(self, outcome: Outcome | Literal["unchanged"]) -> None:
        """Count a request that has ended."""
        self._counts[outcome] += 1

    def record(self, wait: float, first: float | None, total: float) -> None:
        """Record the seconds of an answer from its submit."""
        self._waits.append(wait)
        self._totals.append(total)
        if first is not None:
            self._firsts.append(first)

    def latencies(self) -> Latencies:
        """Return the present figures."""
        return Latencies(
            wait_ms=percentiles(self._waits),
            first_token_ms=percentiles(self._firsts),
            total_ms=percentiles(self._totals),
            answered=self._counts["answered"],
            unchanged=self._counts["unchanged"],
            late=self._counts["late"],
            dropped=self._counts["dropped"],
            superseded=self._counts["superseded"],
            cancelled=self._counts["cancelled"],
            failed=self._counts["failed"],
        )


def percentiles(seconds: deque[float]) -> Percentiles:
    """Return nearest-rank percentiles: the smallest value that at least that share of all values do not exceed."""
    values = sorted(seconds)

    def at(percent: int) -> float:
        return 1000 * values[math.ceil(len(values) * percent / 100) - 1] if values else math.nan

    return Percentiles(at(50), at(95), at(99))
