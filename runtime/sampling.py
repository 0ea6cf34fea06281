"""Sampling: the choice of the next token from the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.arguments import check_integer, check_number, short_repr
from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.logprobs import LogProbabilities, likeliest, likeliest_first, top_tokens

if TYPE_CHECKING:
    from fusion_edge.runtime.constraints.compiler import Constraint

MAX_LOGPROBS = 20
"""Limit of :attr:`Sampling.logprobs`."""


@dataclass(frozen=True)
class Sampling:
    """Parameters of generation.

    Raises:
        UsageError: A value has a wrong type or is out of range.
    """

    max_new_tokens: int = 512
    """Limit of generated tokens, from 1."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy and ignores ``top_p``, ``top_k`` and ``seed``."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens whose probabilities reach this sum; 1 is off."""
    top_k: int = 0
    """Sample from this number of likeliest tokens; 0 is off."""
    seed: int | None = None
    """Random seed; None for a new one each time."""
    stop: tuple[str, ...] = ()
    """Stop strings, which end the answer and are not part of it."""
    grammar: Grammar | None = None
    """What the answer may be; it excludes ``stop``. Default: any text."""
    logprobs: int = 0
    """Number of likeliest tokens in :attr:`Answer.top_logprobs`, at most 20; 0 is off."""

    def __post_init__(self) -> None:
        numbers = {
            "max_new_tokens": check_integer("max_new_tokens", self.max_new_tokens, 1, "an integer from 1"),
            "temperature": check_number(
                "temperature", self.temperature, lambda value: value >= 0, "a finite number from 0 (greedy)"
            ),
            "top_p": check_number(
                "top_p", self.top_p, lambda value: 0 < value <= 1, "a number above 0 and at most 1 (off)"
            ),
            "top_k": check_integer("top_k", self.top_k, 0, "an integer from 0 (off)"),
            "seed": None if self.seed is None else check_integer("seed", self.seed, 0, "an integer from 0, or None"),
            "logprobs": check_integer(
                "logprobs", self.logprobs, 0, f"an integer from 0 (off) to {MAX_LOGPROBS}", MAX_LOGPROBS
            ),
        }
        for name, number in numbers.items():  # converts NumPy scalars
            object.__setattr__(self, name, number)
        if not (isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)):
            raise UsageError(f"stop is {short_repr(self.stop)}; expected a tuple of strings, none of them empty.")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise UsageError(f"grammar is {short_repr(self.grammar)}; expected a Grammar, or None.")
        if self.grammar is not None and self.stop:
            raise UsageError("stop and grammar exclude each other: the grammar says where an answer ends; drop stop.")


class Sampler:
    """Samples the tokens of one answer with its random generator, and keeps their log-probabilities."""

    def __init__(self, sampling: Sampling, constraint: Constraint | None = None) -> None:
        """Start an answer. ``constraint`` is that of ``sampling.grammar``."""
        self._sampling = sampling
        self._constraint = constraint
        self._generator = np.random.default_rng(sampling.seed)
        self.logprobs: list[float] = []
        """Log-probability of every sampled token, at temperature 1, before grammar, top-k and top-p."""
        self.top_logprobs: list[dict[int, float]] = []
        """For every sampled token the likeliest ones and itself; empty without :attr:`Sampling.logprobs`."""

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """Return a token id for ``logits`` ``[V]``: greedy, or sampled after temperature, top-k and top-p.

        Tokens that the grammar forbids are left out first. The first of equal logits ranks highest. A logit of minus
        infinity is never sampled. Raises ``FusionError`` if the largest logit is not finite.
        """
        logprobs = LogProbabilities(logits)
        if self._constraint is None:
            token = self._choose(logits, logprobs.likeliest)
        else:
            allowed = self._constraint.mask(logits)
            token = self._choose(allowed, likeliest(allowed))
            self._constraint.accept(token)
        self.logprobs.append(logprobs[token])
        if self._sampling.logprobs:
            self.top_logprobs.append(logprobs.top(self._sampling.logprobs) | {token: logprobs[token]})
        return token

    def _choose(self, logits: npt.NDArray[np.float32], likeliest: int) -> int:
        if self._sampling.temperature == 0:
            return likeliest
        candidates, probabilities = distribution(logits, self._sampling)
        # Inverse transform sampling. random() is below 1, so the index is always valid.
        cumulative = np.cumsum(probabilities)
        drawn = self._generator.random() * cumulative[-1]
        return int(candidates[np.searchsorted(cumulative, drawn, side="right")])


def distribution(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return candidate token ids ``[n]`` and their probabilities ``[n]``, sorted if top-k or top-p cut some.

    The largest of ``logits`` ``[V]`` must be finite, and ``sampling.temperature`` above 0.
    """
    with np.errstate(over="ignore"):  # a tiny temperature makes all but the largest minus infinity
        scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    candidates = np.arange(len(logits), dtype=np.int64)
    if 0 < sampling.top_k < len(logits):
        candidates = top_tokens(logits, sampling.top_k)
    weights = np.exp(scaled[candidates])
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        # All tokens below this threshold sum to less than 1 - top_p, so the nucleus lies above it. Sorting those few
        # instead of the vocabulary keeps top-p fast.
        probable = np.flatnonzero(probabilities >= (1 - sampling.top_p) / len(probabilities))
        order = likeliest_first(logits[candidates], probable)
        reached = np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p, side="left")
        order = order[: reached + 1]
        candidates, probabilities = candidates[order], probabilities[order] / probabilities[order].sum()
    return candidates, probabilities
