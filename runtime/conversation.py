"""A conversation: questions about one image, each with the earlier ones as its history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.answer_stream import AnswerStream
from fusion_edge.runtime.choices import Choice, choose, prepare_choices
from fusion_edge.runtime.pipeline import Pipeline
from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.request_queue import RequestQueue
from fusion_edge.runtime.run_control import RunControl
from fusion_edge.runtime.structured import document, document_sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusion_edge.runtime.requests import AnswerOptions


class Conversation:
    """Questions about one image, each with the earlier ones as its history.

    :meth:`Fusion.conversation` returns one. Several threads may ask. The history of a question holds every turn that is
    complete when the model starts to answer. An answer that a deadline or a cancel cuts short is not in the history.
    """

    def __init__(
        self, pipeline: Pipeline, queue: RequestQueue, image: Image.Image, control_tokens: bool = False
    ) -> None:
        self.history: list[Turn] = []
        """Complete turns, oldest first. The list may be edited between questions."""
        self._pipeline = pipeline
        self._queue = queue
        self._image = image
        self._control_tokens = control_tokens

    def ask(
        self,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[str]:
        """Ask a question and return the answer piece by piece, as it is generated.

        Taking the first piece asks the question. Taking the last piece appends the turn to :attr:`history`.

        Args:
            question: The question.
            deadline: Seconds from the call until the answer ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`AnswerOptions`.

        Returns:
            Pieces of text. Their concatenation is the answer.

        Raises:
            UsageError: As in :meth:`Fusion.ask`, at the first piece.
            FusionError: As in :meth:`Fusion.ask`, at the first piece.
        """
        control = RunControl(deadline, on_stage)
        return _Pieces(self._queue, control, lambda: self._start(question, control, **options))

    def stream(
        self,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> AnswerStream:
        """Ask a question and return a stream of the answer's pieces, which :meth:`AnswerStream.cancel` ends.

        Taking the last piece appends the turn to :attr:`history`.

        Args:
            question: The question.
            deadline: Seconds from the call until the answer ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`AnswerOptions`.

        Raises:
            UsageError: As in :meth:`Fusion.ask`.
            FusionError: As in :meth:`Fusion.ask`.
        """
        control = RunControl(deadline, on_stage)
        return self._queue.run(lambda: self._start(question, control, **options), control)

    def answer(
        self,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Ask a question, return the complete answer and append the turn to :attr:`history`.

        Args:
            question: The question.
            deadline: Seconds from the call until the answer ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`AnswerOptions`.

        Raises:
            UsageError: As in :meth:`Fusion.ask`.
            FusionError: As in :meth:`Fusion.ask`.
        """
        control = RunControl(deadline, on_stage)
        return self._queue.run(lambda: self._start(question, control, **options).complete(), control)

    def choose(
        self,
        question: str,
        choices: Sequence[str],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        query_length: int | None = None,
    ) -> Choice:
        """Ask which of several answers is right, and append the turn with the likeliest one to :attr:`history`.

        Args:
            question: The question.
            choices: As in :meth:`Fusion.choose`.
            deadline: Seconds from the call until it stops, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            query_length: Number of latents, one of the bundle's query lengths. Default: the first.

        Raises:
            UsageError: As in :meth:`Fusion.choose`.
            FusionError: As in :meth:`Fusion.choose`.
        """
        control = RunControl(deadline, on_stage)
        return self._queue.run(lambda: self._choose(question, choices, control, query_length), control)

    def _choose(self, question: str, choices: Sequence[str], control: RunControl, query_length: int | None) -> Choice:
        self._queue.check_open()
        (prepared,) = prepare_choices(
            self._pipeline,
            self._image,
            [question],
            choices,
            self.history,
            query_length,
            control_tokens=self._control_tokens,
        )
        self._queue.start(control)
        choice = choose(self._pipeline, prepared, control)
        self.history.append(Turn(question, choice.text.strip()))  # as it was scored
        return choice

    def json(
        self,
        question: str,
        schema: dict[str, Any],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Any:
        """Ask a question and return the answer as a JSON document that ``schema`` allows.

        The model does not see the schema: ask for its content in the question. Needs the extra ``constrained``.

        The turn is appended to :attr:`history` if the document is complete.

        Args:
            question: The question.
            schema: A JSON schema, as in :meth:`Grammar.json`.
            deadline: Seconds from the call until the question stops, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`AnswerOptions`.

        Returns:
            The document as Python objects.

        Raises:
            UsageError: The schema is invalid or has an unsupported keyword, or as in :meth:`Fusion.answer`.
            DeadlineExceeded: The deadline passed before the document was complete.
            Cancelled: The question was canceled before the document was complete.
            FusionError: The document needs more than :attr:`Sampling.max_new_tokens`, or as in :meth:`Fusion.answer`.
        """
        options["sampling"] = document_sampling(options, schema)
        return document(self.answer(question, deadline=deadline, on_stage=on_stage, **options))

    def _start(self, question: str, control: RunControl, **options: Unpack[AnswerOptions]) -> AnswerStream:
        """Start an answer with the present history. Call it in the queue."""
        self._queue.check_open()
        prepared = self._pipeline.prepare(
            self._image, question, self.history, control_tokens=self._control_tokens, **options
        )

        def append(answer: Answer) -> None:
            if prepared.constraint is None or answer.finish_reason == "stop":  # no half of a document
                self.history.append(Turn(question, answer.text))

        return AnswerStream(self._pipeline, self._queue, prepared, control, append)


class _Pieces(Iterator[str]):
    """Pieces of an answer that starts when a thread takes the first one."""

    def __init__(self, queue: RequestQueue, control: RunControl, start: Callable[[], AnswerStream]) -> None:
        self._queue, self._control, self._start = queue, control, start
        self._stream: AnswerStream | None = None

    def __next__(self) -> str:
        return next(self._stream or self._queue.run(self._started, self._control))

    def _started(self) -> AnswerStream:
        self._stream = self._stream or self._start()
        return self._stream
