"""An answer: while it is generated, and as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.prompts.prompt import Prompt
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.tokenization.detokenizer import Detokenizer

if TYPE_CHECKING:
    from fusion_edge.runtime.fusion import Fusion

STAGES = ("preprocess", "vision", "alignment", "prefill", "decode")
"""Cutting the crops; both runs of the vision encoder; the alignment decoder; the prompt; one-token steps."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    """Without whitespace at its ends."""
    token_ids: tuple[int, ...]
    """Generated tokens, the end token not included."""
    prompt_tokens: int
    """Rows of the LLM's input: text, image tokens and latents."""
    finish_reason: str
    """``stop`` (end token or stop string) or ``length`` (token limit or full context)."""
    timings_ms: dict[str, float]
    """Milliseconds by stage, see ``STAGES``."""
    tokens_per_second: float
    """Rate of the one-token steps; 0 when the answer took none."""


@dataclass(frozen=True, eq=False)
class Request:
    """A question whose parameters have been checked."""

    picture: Image.Image
    prompt: Prompt
    sampling: Sampling
    query_length: int


class AnswerStream(Iterator[str]):
    """Pieces of an answer. ``answer`` is complete after the last piece.

    Asking the same :class:`Fusion` anything else ends it, as the KV cache is one; its next piece is a
    :class:`FusionError` then. Several threads may take pieces: each piece goes to one of them.
    """

    def __init__(
        self, fusion: Fusion, request: Request, when_complete: Callable[[Answer], None] = lambda _: None
    ) -> None:
        """For :class:`Fusion`, while nothing else is computed; ``when_complete`` is called so, too."""
        self._fusion = fusion
        self._number = fusion.queue.begin()
        self._when_complete = when_complete
        self._timings = dict.fromkeys(STAGES, 0.0)
        self._answer: Answer | None = None
        self._pieces = self._generate(request)

    def __next__(self) -> str:
        if self._answer is None and (piece := self._fusion.queue.run(self._advance)) is not None:
            return piece
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises :class:`UsageError` before the last piece has been taken."""
        if self._answer is None:
            raise UsageError("The answer is not complete; take every piece of the stream first.")
        return self._answer

    def complete(self) -> Answer:
        """The whole answer, all that is left of it computed at once, while nothing else is."""
        while self._advance() is not None:
            pass
        return self.answer

    def _advance(self) -> str | None:
        """The next piece; None behind the last one."""
        if self._answer is not None:  # another thread took the last piece
            return None
        try:
            self._check_going_on()
            piece = next(self._pieces, None)
        except FusionError:
            self._check_going_on()  # what close() interrupts fails for that reason
            raise
        if piece is None and self._answer is None:
            raise FusionError("This answer ended early, by an error or Ctrl-C; ask the question again.")
        return piece

    def _check_going_on(self) -> None:
        if not self._fusion.queue.may_go_on(self._number):
            raise FusionError(
                "This answer was given up when another question was asked or the model closed; finish one before that."
            )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self._check_going_on()
        start = time.perf_counter()
        yield
        self._timings[stage] += 1000 * (time.perf_counter() - start)

    def _start(self, request: Request) -> tuple[int, int, Floats]:
        """Everything up to the prompt: positions taken, positions there are, and logits of the last one taken."""
        fusion = self._fusion
        with self._timed("preprocess"):
            crops = cut_crops(request.picture)
        with self._timed("vision"):
            image = fusion.encode_image(crops)
            self._check_going_on()
            image_tokens = fusion.image_tokens(image, request.prompt.instruct_ids)
        with self._timed("alignment"):
            aligned = fusion.align(image, request.query_length)
        with self._timed("prefill"):
            return fusion.prefill(request.prompt, image_tokens, aligned, request.sampling.max_new_tokens)

    def _generate(self, request: Request) -> Iterator[str]:
        fusion, sampling = self._fusion, request.sampling
        positions, capacity, logits = self._start(request)
        sampler = Sampler(sampling)
        with self._timed("prefill"):
            token = sampler(logits)
        limit = capacity - positions
        text = Detokenizer(fusion.tokenizer, sampling.stop)
        tokens: list[int] = []
        steps = 0
        while token not in fusion.end_ids and len(tokens) < limit:
            tokens.append(token)
            if piece := text.push(token):
                yield piece
            if text.stopped or len(tokens) == limit:
                break
            with self._timed("decode"):
                token = sampler(fusion.backend.decode(fusion.embed(np.array([token]))[0]))
            steps += 1
        if rest := text.finish():
            yield rest
        finished = text.stopped or token in fusion.end_ids
        answer = Answer(
            text=text.text.strip(),  # as the released code does before it prints or keeps a reply
            token_ids=tuple(tokens),
            prompt_tokens=positions,
            finish_reason="stop" if finished else "length",
            timings_ms=self._timings,
            tokens_per_second=1000 * steps / self._timings["decode"] if steps else 0.0,
        )
        self._when_complete(answer)
        self._answer = answer
