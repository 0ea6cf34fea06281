"""Checks of arguments. NumPy's integers and floats count as numbers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from numbers import Integral, Real

from fusion_edge.runtime.errors import UsageError

LONGEST_WAIT = threading.TIMEOUT_MAX / 2
"""Limit of a wait in seconds: a longer one overflows when it is added to the clock."""
MAX_CHARACTERS = 80
"""Limit of characters of a value in a message."""


def short_repr(value: object) -> str:
    """Format a value for a message: one line, cut if it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer with too many digits, or a failing __repr__
        text = f"of type {type(value).__name__}"
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "..."


def is_integer(value: object) -> bool:
    """Return whether a value is an integer, and not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_integer(name: str, value: object, smallest: int, expected: str, largest: int | None = None) -> int:
    """Return ``value`` as an int. Raise ``UsageError`` unless it is an integer from ``smallest`` to ``largest``."""
    limit = math.inf if largest is None else largest
    if not (isinstance(value, Integral) and is_integer(value) and smallest <= int(value) <= limit):
        raise UsageError(f"{name} is {short_repr(value)}; expected {expected}.")
    return int(value)


def check_number(name: str, value: object, in_range: Callable[[float], bool], expected: str) -> float:
    """Return ``value`` as a float. Raise ``UsageError`` unless it is a finite number in range."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and in_range(number)):
        raise UsageError(f"{name} is {short_repr(value)}; expected {expected}.")
    return number


def check_timeout(value: object) -> float | None:
    """Return a timeout in seconds, at most what a lock can wait; None for none.

    Raise ``UsageError`` unless it is None or a finite number from 0.
    """
    if value is None:
        return None
    number = check_number("timeout", value, lambda seconds: seconds >= 0, "a number of seconds from 0, or None")
    return min(number, LONGEST_WAIT)


def check_flag(name: str, value: object) -> bool:
    """Return ``value``. Raise ``UsageError`` unless it is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {short_repr(value)}; expected True or False.")
    return value
