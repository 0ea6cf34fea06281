"""An answer, complete or as a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.pipeline import (
    ALIGNMENT,
    DECODE_STEP,
    ENCODE_GLOBAL,
    ENCODE_LOCAL,
    PREFILL,
    PREPROCESS,
    Pipeline,
)
from fusion_edge.runtime.request_queue import RequestQueue
from fusion_edge.runtime.requests import Request
from fusion_edge.runtime.sampling import Sampler
from fusion_edge.runtime.tokenization.detokenizer import Detokenizer

TIMINGS = {
    PREPROCESS: "preprocess",
    ENCODE_GLOBAL: "vision",
    ENCODE_LOCAL: "vision",
    ALIGNMENT: "alignment",
    PREFILL: "prefill",
    DECODE_STEP: "decode",
}
"""Key in :attr:`Answer.timings_ms` by stage of the pipeline. Sampling counts with the stage before it."""


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    text: str
    """The answer without surrounding whitespace."""
    token_ids: tuple[int, ...]
    """Generated tokens without the end token."""
    prompt_tokens: int
    """Length of the prompt: text tokens, image tokens and latents."""
    finish_reason: str
    """``stop`` for an end token or a stop string, ``length`` for the token limit or a full context."""
    timings_ms: dict[str, float]
    """Milliseconds by stage: ``preprocess``, ``vision``, ``alignment``, ``prefill`` and ``decode``."""
    tokens_per_second: float
    """Decode rate; 0 without a decode step."""


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are generated; :attr:`answer` is complete after the last piece.

    A :class:`Fusion` generates one answer at a time. Another question ends this stream: the next piece raises
    :class:`FusionError`. Several threads may take pieces; each piece goes to one of them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        queue: RequestQueue,
        request: Request,
        when_complete: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        """Start the answer. Call it in the queue, which also calls ``when_complete``."""
        self._pipeline = pipeline
        self._queue = queue
        self._number = queue.start()
        self._when_complete = when_complete
        self._timings = dict.fromkeys(TIMINGS.values(), 0.0)
        self._timing = ""
        self._answer: Answer | None = None
        self._pieces = self._generate(request)

    def __next__(self) -> str:
        if self._answer is None and (piece := self._queue.run(self._advance)) is not None:
            return piece
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The complete answer.

        Raises:
            UsageError: The stream has pieces left.
        """
        if self._answer is None:
            raise UsageError("The answer is not complete; take every piece of the stream first.")
        return self._answer

    def complete(self) -> Answer:
        """Generate the rest and return the complete answer. Call it in the queue."""
        while self._advance() is not None:
            pass
        return self.answer

    def _advance(self) -> str | None:
        """Return the next piece; None after the last one."""
        if self._answer is not None:  # another thread took the last piece
            return None
        try:
            self._check_current()
            piece = next(self._pieces, None)
        except FusionError:
            self._check_current()  # close() may have interrupted the run
            raise
        if piece is None and self._answer is None:
            raise FusionError("This answer ended early, by an error or Ctrl-C; ask the question again.")
        return piece

    def _check_current(self) -> None:
        if not self._queue.is_current(self._number):
            raise FusionError(
                "This answer ended because another question was asked or the model was closed; take all pieces first."
            )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self._check_current()
        self._timing = TIMINGS.get(stage, self._timing)
        start = time.perf_counter()
        yield
        self._timings[self._timing] += 1000 * (time.perf_counter() - start)

    def _generate(self, request: Request) -> Iterator[str]:
        pipeline, sampler = self._pipeline, Sampler(request.sampling)
        prefilled = pipeline.start(request, sampler, self._timed)
        token, limit = prefilled.token, prefilled.capacity - prefilled.length
        text = Detokenizer(pipeline.tokenizer, request.sampling.stop)
        tokens: list[int] = []
        steps = 0
        while token not in pipeline.end_ids and len(tokens) < limit:
            tokens.append(token)
            if piece := text.push(token):
                yield piece
            if text.stopped or len(tokens) == limit:
                break
            token = pipeline.decode(token, sampler, self._timed)
            steps += 1
        if rest := text.finish():
            yield rest
        is_stopped = text.stopped or token in pipeline.end_ids
        answer = Answer(
            text=text.text.strip(),  # as in the released code
            token_ids=tuple(tokens),
            prompt_tokens=prefilled.length,
            finish_reason="stop" if is_stopped else "length",
            timings_ms=self._timings,
            tokens_per_second=1000 * steps / self._timings["decode"] if steps else 0.0,
        )
        self._when_complete(answer)
        self._answer = answer
