"""Checks of what callers pass. NumPy's integers and floats are numbers like Python's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

from fusion_edge.runtime.errors import UsageError

SHOWN = 80
"""Characters of a wrong value that a message shows."""


def shown(value: object) -> str:
    """A value on one line of a message, cut if it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of too many digits, or a class whose __repr__ fails
        text = f"of type {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def is_integer(value: object) -> bool:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(name: str, value: object, smallest: int, expected: str) -> int:
    """``value`` as an int. Raises ``UsageError`` unless it is an integer from ``smallest``."""
    if not (isinstance(value, Integral) and is_integer(value) and int(value) >= smallest):
        raise UsageError(f"{name} is {shown(value)}; expected {expected}.")
    return int(value)


def real(name: str, value: object, in_range: Callable[[float], bool], expected: str) -> float:
    """``value`` as a float. Raises ``UsageError`` unless it is a number that a float can be, finite and in range."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and in_range(number)):
        raise UsageError(f"{name} is {shown(value)}; expected {expected}.")
    return number


def flag(name: str, value: object) -> bool:
    """``value`` as it is. Raises ``UsageError`` unless it is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {shown(value)}; expected True or False.")
    return value
