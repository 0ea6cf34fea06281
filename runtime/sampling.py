"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.arguments import integer, real, shown
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
        numbers = {
            "max_new_tokens": integer("max_new_tokens", self.max_new_tokens, 1, "an integer from 1"),
            "temperature": real(
                "temperature", self.temperature, lambda value: value >= 0, "a finite number from 0 (greedy)"
            ),
            "top_p": real("top_p", self.top_p, lambda value: 0 < value <= 1, "a number above 0 and at most 1 (off)"),
            "top_k": integer("top_k", self.top_k, 0, "an integer from 0 (off)"),
            "seed": None if self.seed is None else integer("seed", self.seed, 0, "an integer from 0, or None"),
        }
        for name, number in numbers.items():  # NumPy's become Python's
            object.__setattr__(self, name, number)
        if not (isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)):
            raise UsageError(f"stop is {shown(self.stop)}; expected a tuple of strings, none of them empty.")


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


def _likeliest_first(logits: npt.NDArray[np.float32], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # By the logits themselves: scaled, or as probabilities, some that differ would round to equals.
    return indices[np.argsort(-logits[indices], kind="stable")]
