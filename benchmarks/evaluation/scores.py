"""Right or wrong answers, and shares with their confidence intervals."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

Z = 1.96
"""Standard deviations of a 95% confidence interval."""


@dataclass(frozen=True)
class Share:
    """A number of cases out of all."""

    count: int
    total: int
    share: float
    """``count`` over ``total``; 0 of 0 is 0."""
    ci95: tuple[float, float]
    """95% confidence interval of the share (Wilson), for independent cases."""

    @classmethod
    def of(cls, count: int, total: int) -> Share:
        """Return ``count`` out of ``total``."""
        return cls(count, total, count / total if total else 0.0, wilson(count, total))


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a binomial share (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    if not total:
        return 0.0, 1.0
    share, weight = count / total, Z * Z / total
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def is_exact(given: str, expected: str) -> bool:
    """Return whether two answers are the same text, apart from whitespace around it."""
    return given.strip() == expected.strip()


def contains(given: str, expected: str) -> bool:
    """Return whether an answer contains the words of the expected one, in their order and next to each other.

    Case and punctuation do not count. Expected text without words, such as ``+``, must be the whole answer.
    """
    words = _words(expected)
    return f" {words} " in f" {_words(given)} " if words else is_exact(given, expected)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
