"""The stream of an answer's pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fusion_edge.runtime.answer import Answer, FinishReason
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.pipeline import Pipeline
from fusion_edge.runtime.request_queue import RequestQueue
from fusion_edge.runtime.requests import PreparedQuestion
from fusion_edge.runtime.run_control import RunControl, StopSignal
from fusion_edge.runtime.sampling import Sampler
from fusion_edge.runtime.tokenization.detokenizer import Detokenizer


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are generated; :attr:`answer` is complete after the last piece.

    A :class:`Fusion` generates one answer at a time. Another question ends this stream: the next piece raises
    :class:`FusionError`. Several threads may take pieces; each piece goes to one of them.

    A deadline or :meth:`cancel` ends the pieces early, and :attr:`Answer.finish_reason` says so. If no token of the
    answer was generated yet, they raise :class:`DeadlineExceeded` or :class:`Cancelled`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        queue: RequestQueue,
        question: PreparedQuestion,
        control: RunControl,
        when_complete: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        """Start the answer. Call it in the queue, which also calls ``when_complete`` unless the answer is cut short."""
        self._pipeline = pipeline
        self._queue = queue
        self._control = control
        self._when_complete = when_complete
        self._answer: Answer | None = None
        self._partial: Answer | None = None
        """What a question reached that stopped with an error. The error itself would keep frames, and they pictures."""
        self._text = Detokenizer(pipeline.tokenizer, question.sampling.stop)
        self._sampler = Sampler(question.sampling, question.constraint)
        self._token_ids: list[int] = []
        self._prompt_tokens = self._steps = 0
        self._is_ended = False
        """Whether an end token ended the answer."""
        queue.start(control)
        self._pieces = self._generate(question)

    def __next__(self) -> str:
        if self._answer is None and (piece := self._queue.run(self._advance, self._control)) is not None:
            return piece
        raise StopIteration

    def cancel(self) -> None:
        """End the answer early. Any thread may call this; it does not wait for the end.

        A graph that runs for this answer ends within a fraction of a second. After the last piece, do nothing.
        """
        if self._answer is None:
            self._queue.stop(self._control, "cancelled")

    @property
    def answer(self) -> Answer:
        """The answer.

        Raises:
            UsageError: The stream has pieces left.
        """
        if self._answer is None:
            raise UsageError("The answer is not complete; take every piece of the stream first.")
        return self._answer

    def complete(self, when_piece: Callable[[str], object] = lambda _: None) -> Answer:
        """Generate the rest, pass each piece to ``when_piece``, and return the answer. Call it in the queue."""
        while (piece := self._advance()) is not None:
            when_piece(piece)
        return self.answer

    def _advance(self) -> str | None:
        """Return the next piece; None after the last one."""
        if self._answer is not None:  # another thread took the last piece
            return None
        if self._partial is not None:
            raise self._control.error(self._partial)
        if not self._queue.is_current(self._control):
            raise FusionError("This answer ended because another question was asked; take all pieces first.")
        piece = next(self._pieces, None)
        if piece is None and self._answer is None:
            raise FusionError("This answer ended early, by an error or Ctrl-C; ask the question again.")
        return piece

    def _generate(self, question: PreparedQuestion) -> Iterator[str]:
        finish_reason: FinishReason | None = None
        try:
            for token in self._tokens(question):
                if piece := self._text.push(token):
                    yield piece
                if self._text.stopped:
                    break
        except StopSignal:
            finish_reason = self._control.finish_reason
        if rest := self._text.finish():
            yield rest
        if finish_reason is None:
            self._answer = self._reached("stop" if self._text.stopped or self._is_ended else "length")
            self._when_complete(self._answer)
        elif self._control.reason == "closed" or not self._token_ids:
            self._partial = self._reached(finish_reason)
            raise self._control.error(self._partial)
        else:
            self._answer = self._reached(finish_reason)

    def _tokens(self, question: PreparedQuestion) -> Iterator[int]:
        """Generate the tokens of the answer, without the end token."""
        pipeline, hook, sampler = self._pipeline, self._control.stage_hook, self._sampler
        prefilled = pipeline.start(question, sampler, hook)
        self._prompt_tokens = prefilled.length
        token, limit = prefilled.token, prefilled.capacity - prefilled.length
        while token not in pipeline.end_ids and len(self._token_ids) < limit:
            self._token_ids.append(token)
            yield token
            if len(self._token_ids) == limit:
                return
            token = pipeline.decode(token, sampler, hook)
            self._steps += 1
        self._is_ended = token in pipeline.end_ids

    def _reached(self, finish_reason: FinishReason) -> Answer:
        """Return the answer so far."""
        timings, count = self._control.timings_ms, len(self._token_ids)
        return Answer(
            text=self._text.text.strip(),  # as in the released code
            token_ids=tuple(self._token_ids),
            prompt_tokens=self._prompt_tokens,
            finish_reason=finish_reason,
            timings_ms=dict(timings),
            tokens_per_second=1000 * self._steps / timings["decode"] if self._steps else 0.0,
            logprobs=tuple(self._sampler.logprobs[:count]),  # without the end token
            top_logprobs=tuple(self._sampler.top_logprobs[:count]),
        )
