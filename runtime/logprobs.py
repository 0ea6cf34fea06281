"""Log-probabilities of the next token: the model's own, at temperature 1."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.errors import FusionError


class LogProbabilities:
    """Natural logarithms of the softmax of ``logits`` ``[V]``, computed for the tokens that are asked for.

    Valid as long as ``logits``. Raises :class:`FusionError` as :func:`likeliest` does.
    """

    def __init__(self, logits: npt.NDArray[np.float32]) -> None:
        self._logits = logits
        self.likeliest = likeliest(logits)
        largest = logits[self.likeliest]
        weights = logits - largest
        np.exp(weights, out=weights)
        self._normalizer = float(largest) + math.log(np.add.reduce(weights))

    def __getitem__(self, token: int) -> float:
        return min(0.0, float(self._logits[token]) - self._normalizer)  # rounding may exceed 0

    def top(self, count: int) -> dict[int, float]:
        """Return the ``count`` likeliest tokens, likeliest first, without those of probability 0."""
        tokens = top_tokens(self._logits, count)
        return {token: self[token] for token in tokens.tolist() if self._logits[token] > -np.inf}


def likeliest(logits: npt.NDArray[np.float32]) -> int:
    """Return the token of the largest logit, the first of equal ones.

    Raises :class:`FusionError` if that logit is not finite.
    """
    token = int(logits.argmax())
    if not math.isfinite(logits[token]):  # a NaN, if there is one
        raise FusionError(
            f"The model's logits contain {logits[token]}: the bundle overflows on this device; export it with "
            "a higher precision."
        )
    return token


def top_tokens(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Return the ``count`` likeliest tokens ``[n]``, likeliest first; of equal logits the first ones."""
    if count >= len(logits):
        return likeliest_first(logits, np.arange(len(logits), dtype=np.int64))
    threshold = np.partition(logits, -count)[-count]
    return likeliest_first(logits, np.flatnonzero(logits >= threshold))[:count]


def likeliest_first(logits: npt.NDArray[np.float32], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sort indices by their logits; equal ones keep their order."""
    # Not by scaled logits or probabilities, which may round different values to equal ones.
    return indices[np.argsort(-logits[indices], kind="stable")]


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Return the log-probabilities ``[...,V]`` of logits."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)
    return result


def divergences(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return KL(reference || other) ``[n]`` in nats, for log-probabilities ``[n,V]``."""
    p = np.exp(reference.astype(np.float64))
    with np.errstate(invalid="ignore"):  # 0 * (-inf - -inf) counts as 0
        terms = np.where(p > 0, p * (reference.astype(np.float64) - other), 0.0)
    sums: npt.NDArray[np.float64] = np.maximum(terms.sum(-1), 0.0)  # rounding may give a tiny negative value
    return sums
