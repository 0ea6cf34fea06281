"""Calibration of probabilities: whether answers given with 80 % are right in 80 % of cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence lies in one interval."""

    low: float
    """Least confidence of the interval, included."""
    high: float
    """End of the interval, excluded except for 1."""
    count: int
    """Answers, at least 1."""
    confidence: float
    """Mean confidence."""
    accuracy: float
    """Share of right answers."""


def reliability(confidences: npt.ArrayLike, is_right: npt.ArrayLike, bins: int = BINS) -> tuple[Bin, ...]:
    """Return the bins that hold answers, in order of confidence; the intervals from 0 to 1 have equal widths.

    Args:
        confidences: ``[n]`` probabilities, from 0 to 1, that an answer is right.
        is_right: ``[n]`` booleans.
        bins: Number of intervals.

    Raises:
        ValueError: The arrays differ in shape, or a confidence is outside 0 to 1.
    """
    confidence, right = np.asarray(confidences, np.float64), np.asarray(is_right, np.bool_)
    if confidence.ndim != 1 or confidence.shape != right.shape:
        raise ValueError(f"confidences {confidence.shape} and is_right {right.shape} differ; expected [n] and [n]")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence is outside 0 to 1")
    edges, numbers = np.arange(bins + 1) / bins, bin_numbers(confidence, bins)
    return tuple(
        Bin(
            low=float(edges[number]),
            high=float(edges[number + 1]),
            count=int((numbers == number).sum()),
            confidence=float(confidence[numbers == number].mean()),
            accuracy=float(right[numbers == number].mean()),
        )
        for number in np.unique(numbers)
    )


def bin_numbers(confidences: npt.NDArray[np.float64], bins: int = BINS) -> npt.NDArray[np.intp]:
    """Return the number ``[n]`` of the interval that each confidence ``[n]``, from 0 to 1, is in."""
    edges = np.arange(bins + 1) / bins
    return np.clip(np.searchsorted(edges, confidences, side="right") - 1, 0, bins - 1)


def expected_calibration_error(confidences: npt.ArrayLike, is_right: npt.ArrayLike, bins: int = BINS) -> float:
    """Return the mean distance between confidence and accuracy of the bins, weighted by their answers; 0 if none.

    Arguments and errors as in :func:`reliability`.
    """
    filled = reliability(confidences, is_right, bins)
    total = sum(bin.count for bin in filled)
    return sum(bin.count * abs(bin.confidence - bin.accuracy) for bin in filled) / max(total, 1)
