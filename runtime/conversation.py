"""RequestQueue about one image, each with those before it as history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from PIL import Image

from fusion_edge.runtime.answers import Answer, AnswerStream
from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.request_queue import RequestQueue
from fusion_edge.runtime.sampling import Sampling

if TYPE_CHECKING:
    from fusion_edge.runtime.fusion import Fusion


class Conversation:
    """RequestQueue about one image, each with those before it as history.

    Several threads may ask: a question has all turns as its history that were complete when its own turn came.
    """

    def __init__(self, fusion: Fusion, image: Image.Image, control_tokens: bool = False) -> None:
        self._fusion = fusion
        self._image = image
        self._control_tokens = control_tokens
        self.history: list[Turn] = []

    def ask(self, question: str, *, sampling: Sampling | None = None, query_length: int | None = None) -> Iterator[str]:
        """The answer piece by piece; it joins the history when it is complete.

        The question is asked when the first piece is taken. Errors as of :meth:`Fusion.answer`.
        """
        return _Pieces(self._fusion.queue, lambda: self._begin(question, sampling, query_length))

    def answer(self, question: str, *, sampling: Sampling | None = None, query_length: int | None = None) -> Answer:
        """The whole answer; it joins the history. Errors as of :meth:`Fusion.answer`."""
        return self._fusion.queue.run(lambda: self._begin(question, sampling, query_length).complete())

    def _begin(self, question: str, sampling: Sampling | None, query_length: int | None) -> AnswerStream:
        """The question, with the history as it is now, while no other one is computed."""
        request = self._fusion.request(
            self._image, question, self.history, sampling, query_length, self._control_tokens
        )
        return AnswerStream(self._fusion, request, lambda answer: self.history.append(Turn(question, answer.text)))


class _Pieces(Iterator[str]):
    """Pieces of an answer to a question that is asked when the first is taken, by whichever thread."""

    def __init__(self, questions: RequestQueue, begin: Callable[[], AnswerStream]) -> None:
        self._questions, self._begin = questions, begin
        self._stream: AnswerStream | None = None

    def __next__(self) -> str:
        return next(self._stream or self._questions.run(self._started))

    def _started(self) -> AnswerStream:
        self._stream = self._stream or self._begin()
        return self._stream
