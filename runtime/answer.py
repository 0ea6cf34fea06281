"""An answer, complete or cut short."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
"""Why an answer ended."""


@dataclass(frozen=True)
class Answer:
    """An answer."""

    text: str
    """The answer without surrounding whitespace."""
    token_ids: tuple[int, ...]
    """Generated tokens without the end token."""
    prompt_tokens: int
    """Length of the prompt: text tokens, image tokens and latents; 0 if the question stopped before prefill ended."""
    finish_reason: FinishReason
    """``stop`` for an end token or a stop string, ``length`` for the token limit or a full context, ``deadline`` or
    ``cancelled`` for an answer cut short."""
    timings_ms: dict[str, float]
    """Milliseconds by stage: ``preprocess``, ``vision``, ``alignment``, ``prefill`` and ``decode``; 0 for a stage that
    was not reached."""
    tokens_per_second: float
    """Decode rate; 0 without a decode step."""
    logprobs: tuple[float, ...] = ()
    """Natural logarithm of the model's probability of each token of ``token_ids``, at temperature 1."""
    top_logprobs: tuple[dict[int, float], ...] = ()
    """For each token the likeliest token ids, likeliest first, and the chosen one, with their log-probabilities. Empty
    without :attr:`Sampling.logprobs`."""

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities, from 0 to 1; 0 for an empty answer."""
        return math.exp(math.fsum(self.logprobs) / len(self.logprobs)) if self.logprobs else 0.0

    @property
    def is_complete(self) -> bool:
        """Whether neither a deadline nor a cancel cut the answer short."""
        return self.finish_reason in ("stop", "length")
