"""Estimates over questions about pictures, with confidence intervals that know that questions share pictures.

Questions about one picture are right or wrong together more often than others. So pictures are resampled, each with all
its questions (cluster bootstrap with percentile intervals: Davison and Hinkley, Bootstrap Methods and their
Application, 1997, sections 3.8 and 5.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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

    def mean(self, values: npt.ArrayLike) -> Estimate:
        """Return the mean of ``values`` ``[n]``, such as 1 for a right answer, or its difference from another's."""
        tops, bottoms = self._sums(values), self._sums(np.ones(len(self._places)))
        return _estimate(tops.sum() / bottoms.sum(), (self._draws @ tops) / (self._draws @ bottoms))

    def ratio(self, values: npt.ArrayLike, others: npt.ArrayLike) -> Estimate | None:
        """Return the sum of ``values`` ``[n]`` over that of ``others`` ``[n]``.

        None unless the interval of the latter is above 0: a ratio to what may be nothing says nothing.
        """
        tops, bottoms = self._sums(values), self._sums(others)
        drawn = self._draws @ bottoms
        if np.quantile(drawn, TAILS[0]) <= 0:
            return None
        is_positive = drawn > 0
        return _estimate(tops.sum() / bottoms.sum(), (self._draws @ tops)[is_positive] / drawn[is_positive])

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
