"""Outputs in float16 against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.errors import FusionError

ROUNDING = 2.0**-11
"""Half a unit in the last place of float16, relative."""
SUMS = 2.0**-12
"""Sums of up to 4,096 terms in float32, relative to the largest magnitude: each addition rounds by 2^-24."""


def largest_error(
    label: str, actual: npt.NDArray[Any], expected: npt.NDArray[np.float64], absolute: float = 0.0
) -> float:
    """Return the largest absolute error of a float16 result.

    Raises :class:`FusionError` if an element is further from ``expected`` than one rounding to float16 and sums in
    float32 explain, plus ``absolute``, or if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise FusionError(f"{label}: the result has the shape {list(actual.shape)}, expected {list(expected.shape)}.")
    if not expected.size:
        return 0.0
    errors = np.abs(actual.astype(np.float64) - expected)
    allowed = ROUNDING * np.abs(expected) + SUMS * np.abs(expected).max() + absolute
    wrong = ~(errors <= allowed)  # NaN is wrong, too
    if wrong.any():
        first = tuple(map(int, np.argwhere(wrong)[0]))
        raise FusionError(
            f"{label}: {wrong.sum()} of {wrong.size} elements are wrong; at {list(first)} {actual[first]:.5g}, "
            f"expected {expected[first]:.5g} with an error of at most {allowed[first]:.2g}."
        )
    return float(errors.max())
