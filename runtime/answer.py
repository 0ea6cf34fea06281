"""An answer, complete or cut short."""

from __future__ import annotations

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

    @property
    def is_complete(self) -> bool:
        """Whether neither a deadline nor a cancel cut the answer short."""
        return self.finish_reason in ("stop", "length")
