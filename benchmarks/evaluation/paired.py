"""Estimates over questions about pictures, with confidence intervals that know that questions share pictures.

Questions about one picture are right or wrong together more often than others. So pictures are resampled, each with all
its questions (cluster bootstrap with percentile intervals: Davison and Hinkley, Bootstrap Methods and their
Application, 1997, sections 3.8 and 5.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.evaluation.calibration_error import BINS, bin_numbers, expected_calibration_error

RESAMPLES = 4000
TAILS = (0.025, 0.975)
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval."""

    value: float
    ci95: tuple[float, float]


class Pictures:
    """The pictures that questions are about, drawn again and again. The same pictures give the same intervals."""

    def __init__(self, numbers: npt.ArrayLike) -> None:
        """``numbers`` ``[n]`` are the pictures of the n questions, at least one."""
        names, self._places = np.unique(np.asarray(numbers), return_inverse=True)
        count = len(names)
        draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        self._draws = draws.astype(np.float64)
        """``[RESAMPLES, pictures]``: how often each picture was drawn."""

    def mean(self, values: npt.ArrayLike, bounds: tuple[float, float] | None = None) -> Estimate:
        """Return the mean of ``values`` ``[n]``, such as 1 for a right answer, or its difference from another's.

        Pictures with equal means have no spread to resample. The interval then reaches towards the ``bounds`` of a
        value by the share of pictures with other values that a sample misses with 2.5 % probability. A few pictures
        with other values still make the interval too narrow. Raises ValueError unless there is one value a question.
        """
        tops, bottoms = self._sums(values), self._sums(np.ones(len(self._places)))
        mean = _estimate(tops.sum() / bottoms.sum(), (self._draws @ tops) / (self._draws @ bottoms))
        if bounds is None or np.ptp(tops / bottoms) > 0:
            return mean
        unseen = 1 - TAILS[0] ** (1 / len(tops))
        low, high = (mean.value + unseen * (bound - mean.value) for bound in bounds)
        return Estimate(mean.value, (low, high))

    def calibration_error(self, confidences: npt.ArrayLike, is_right: npt.ArrayLike) -> Estimate:
        """Return the expected calibration error of answers ``[n]``, in :data:`BINS` bins.

        The interval is a little too high: what resampling adds to a bin's distance does not cancel. Raises ValueError
        as :func:`expected_calibration_error` does, and unless there is one confidence a question.
        """
        value = expected_calibration_error(confidences, is_right)
        confidence = np.asarray(confidences, np.float64)
        gaps, numbers = confidence - np.asarray(is_right, np.float64), bin_numbers(confidence)
        sums = np.stack([self._sums(np.where(numbers == number, gaps, 0)) for number in range(BINS)], axis=1)
        counts = self._sums(np.ones(len(self._places)))
        drawn = np.abs(self._draws @ sums).sum(1) / (self._draws @ counts)
        return _estimate(value, drawn)

    def ratio(self, values: npt.ArrayLike, others: npt.ArrayLike) -> Estimate | None:
        """Return the sum of ``values`` ``[n]`` over that of ``others`` ``[n]``.

        None unless the latter is above 0 in every resample: a ratio to what may be nothing says nothing. Raises
        ValueError unless there is one value of each a question.
        """
        tops, bottoms = self._sums(values), self._sums(others)
        drawn = self._draws @ bottoms
        if drawn.min() <= 0:
            return None
        return _estimate(tops.sum() / bottoms.sum(), (self._draws @ tops) / drawn)

    def _sums(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the sum of each picture. Raises ValueError unless there is one value a question."""
        weights = np.asarray(values, np.float64)
        if weights.shape != self._places.shape:
            raise ValueError(f"values {weights.shape} differ from the questions {self._places.shape}")
        sums: npt.NDArray[np.float64] = np.bincount(self._places, weights).astype(np.float64)
        return sums


def _estimate(value: float, resampled: npt.NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(resampled, TAILS)
    return Estimate(float(value), (float(low), float(high)))
