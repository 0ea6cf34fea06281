"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.errors import FusionError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated. Raises ``UsageError`` for a value outside its range."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 takes the likeliest token (greedy); ``top_p``, ``top_k`` and ``seed`` then change nothing."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 for all."""
    seed: int | None = None
    """The same seed gives the same draws; None gives new ones every time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""

    def __post_init__(self) -> None:
        is_count = _is_integer(self.max_new_tokens, 1)
        _check("max_new_tokens", self.max_new_tokens, is_count, "an integer from 1")
        is_temperature = _is_real(self.temperature) and self.temperature >= 0
        _check("temperature", self.temperature, is_temperature, "a finite number from 0 (greedy)")
        is_top_p = _is_real(self.top_p) and 0 < self.top_p <= 1
        _check("top_p", self.top_p, is_top_p, "a number above 0 and at most 1 (off)")
        _check("top_k", self.top_k, _is_integer(self.top_k, 0), "an integer from 0 (off)")
        is_seed = self.seed is None or _is_integer(self.seed, 0)
        _check("seed", self.seed, is_seed, "an integer from 0, or None")
        is_stop = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        _check("stop", self.stop, is_stop, "a tuple of strings, none of them empty")


class Sampler:
    """Chooses one token after another; holds the random generator of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The id from ``logits`` ``[V]``: greedy, or drawn after temperature, top-k and top-p, in this order.

        Of equal logits the first counts as the larger. A token at minus infinity is never drawn. Raises
        ``FusionError`` if the largest logit is no finite number.
        """
        likeliest = int(np.argmax(logits))  # where a NaN is, if there is one
        if not np.isfinite(logits[likeliest]):
            raise FusionError(
                f"The model's logits contain {logits[likeliest]}; this bundle overflows on this device: "
                "export it again with a higher precision."
            )
        if self._sampling.temperature == 0:
            return likeliest
        candidates, probabilities = distribution(logits, self._sampling)
        # Inverse of the cumulative distribution; draws lie in [0, 1), so the index is always a candidate's.
        cumulative = np.cumsum(probabilities)
        drawn = self._generator.random() * cumulative[-1]
        return int(candidates[np.searchsorted(cumulative, drawn, side="right")])


def distribution(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Token ids that may be drawn ``[n]`` and their probabilities ``[n]``, likeliest first if some were cut.

    ``logits`` ``[V]`` with a finite largest value, ``sampling.temperature`` above 0.
    """
    with np.errstate(over="ignore"):  # a tiny temperature: all but the largest go to minus infinity
        scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    candidates = np.arange(len(logits), dtype=np.int64)
    if 0 < sampling.top_k < len(logits):
        threshold = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        candidates = _likeliest_first(logits, np.flatnonzero(logits >= threshold))[: sampling.top_k]
    weights = np.exp(scaled[candidates])
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        # All tokens below this hold less than 1 - top_p together, so the nucleus lies above: sorting these
        # few, not the whole vocabulary, is what keeps top-p quick.
        probable = np.flatnonzero(probabilities >= (1 - sampling.top_p) / len(probabilities))
        order = _likeliest_first(logits[candidates], probable)
        reached = np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p, side="left")
        order = order[: reached + 1]
        candidates, probabilities = candidates[order], probabilities[order] / probabilities[order].sum()
    return candidates, probabilities


def _likeliest_first(
    logits: npt.NDArray[np.float32], indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    # By the logits themselves: scaled, or as probabilities, some that differ would round to equals.
    return indices[np.argsort(-logits[indices], kind="stable")]


def _is_integer(value: object, smallest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= smallest


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UsageError(f"{name} is {value!r}; expected {expected}.")
