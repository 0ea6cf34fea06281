"""A scene: many questions about one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.answer_stream import AnswerStream
from fusion_edge.runtime.choices import Choice, PreparedChoices, choose, prepare_choices
from fusion_edge.runtime.image_cache import CacheEntry
from fusion_edge.runtime.pipeline import Pipeline
from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.request_queue import RequestQueue
from fusion_edge.runtime.requests import PreparedQuestion
from fusion_edge.runtime.run_control import RunControl
from fusion_edge.runtime.structured import document, document_sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusion_edge.runtime.requests import SceneOptions


class Scene:
    """A picture that the model has looked at, for many questions.

    :meth:`Fusion.look` returns one. With a guide, all questions share the image tokens under that guide, and the KV
    cache up to them. If the guide is the question, the answer is that of :meth:`Fusion.ask`; in a conversation, the
    guide is all questions so far, without a separator. Without a guide each question is its own guide.

    Several threads may ask. A scene is cached until later pictures take its place.
    """

    def __init__(
        self, pipeline: Pipeline, queue: RequestQueue, entry: CacheEntry, guide: str | None, query_length: int
    ) -> None:
        self.guide = guide
        """Text that guided the vision encoder; None if each question guides it."""
        self.query_length = query_length
        """Latents per question."""
        self._pipeline = pipeline
        self._queue = queue
        self._entry = entry

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the KV cache of the scene, but with the next question if the latest one was about this scene.

        Its picture stays cached until the place is needed: a closed scene is evicted before any other picture.
        Closing again does nothing. Any thread may call this; it does not wait.
        """
        self._entry.close()

    def ask(
        self,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[SceneOptions],
    ) -> Iterator[str]:
        """Ask a question about the scene and return the answer piece by piece, as :meth:`Fusion.ask`.

        Args:
            question: The question.
            deadline: Seconds from the call until the answer ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`SceneOptions`.

        Returns:
            Pieces of text. Their concatenation is the answer; a returned piece never changes.

        Raises:
            UsageError: An argument has a wrong type or is out of range, or the scene or the model is closed.
            SceneEvicted: Later pictures took the place of the scene.
            FusionError: The conversation does not fit the context.
            DeadlineExceeded: The deadline passed before the answer began.
            Cancelled: The question was canceled before the answer began, or the model was closed.
        """
        return self.stream(question, deadline=deadline, on_stage=on_stage, **options)

    def answer(
        self,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[SceneOptions],
    ) -> Answer:
        """Ask a question about the scene and return the answer, as :meth:`Fusion.answer`.

        Args:
            question: The question.
            deadline: Seconds from the call until the answer ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`SceneOptions`.

        Raises:
            UsageError: As in :meth:`ask`.
            FusionError: As in :meth:`ask`.
        """
        return self.answer_under(RunControl(deadline, on_stage), lambda _: None, question, **options)

    def answer_under(
        self,
        control: RunControl,
        when_piece: Callable[[str], object],
        question: str,
        **options: Unpack[SceneOptions],
    ) -> Answer:
        """Answer as :meth:`answer` does, under the caller's control, and pass each piece to ``when_piece``."""
        prepared = self.prepare(question, **options)
        return self._queue.run(lambda: self._start(prepared, control).complete(when_piece), control)

    def stream(
        self,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[SceneOptions],
    ) -> AnswerStream:
        """Ask a question about the scene and return a stream of the answer's pieces, as :meth:`Fusion.stream`.

        Args:
            question: The question.
            deadline: Seconds from the call until the answer ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`SceneOptions`.

        Raises:
            UsageError: As in :meth:`ask`.
            FusionError: As in :meth:`ask`.
        """
        control = RunControl(deadline, on_stage)
        prepared = self.prepare(question, **options)
        return self._queue.run(lambda: self._start(prepared, control), control)

    @overload
    def choose(
        self,
        question: str,
        choices: Sequence[str],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        history: Sequence[Turn] = (),
        control_tokens: bool = False,
    ) -> Choice: ...

    @overload
    def choose(
        self,
        question: list[str] | tuple[str, ...],
        choices: Sequence[str],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        history: Sequence[Turn] = (),
        control_tokens: bool = False,
    ) -> list[Choice]: ...

    def choose(
        self,
        question: str | list[str] | tuple[str, ...],
        choices: Sequence[str],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        history: Sequence[Turn] = (),
        control_tokens: bool = False,
    ) -> Choice | list[Choice]:
        """Ask about the scene which of several answers is right, as :meth:`Fusion.choose`.

        Args:
            question: The question, or a list of questions, which are asked one after another.
            choices: As in :meth:`Fusion.choose`.
            deadline: Seconds from the call until it stops, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            history: Earlier questions about the scene, with their answers. Default: none.
            control_tokens: As in :class:`QuestionOptions`.

        Returns:
            The choice; for a list, one per question.

        Raises:
            UsageError: As in :meth:`ask`, or the choices cannot be compared.
            FusionError: As in :meth:`ask`, or a choice does not fit the context.
        """
        questions = question if isinstance(question, list | tuple) else (question,)
        control = RunControl(deadline, on_stage)
        chosen = self.choose_under(control, questions, choices, history=history, control_tokens=control_tokens)
        return chosen if questions is question else chosen[0]

    def choose_under(
        self,
        control: RunControl,
        questions: Sequence[str],
        choices: Sequence[str],
        *,
        history: Sequence[Turn] = (),
        control_tokens: bool = False,
    ) -> list[Choice]:
        """Choose as :meth:`choose` does, under the caller's control."""
        self._check()
        prepared = prepare_choices(
            self._pipeline,
            self._entry,
            questions,
            choices,
            history,
            self.query_length,
            control_tokens=control_tokens,
        )
        return [self._queue.run(partial(self._choose, one, control), control) for one in prepared]

    def is_of(self, queue: RequestQueue) -> bool:
        """Return whether this is a scene of the model that ``queue`` serves."""
        return self._queue is queue

    def _choose(self, prepared: PreparedChoices, control: RunControl) -> Choice:
        self._queue.start(control)
        return choose(self._pipeline, prepared, control)

    def json(
        self,
        question: str,
        schema: dict[str, Any],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[SceneOptions],
    ) -> Any:
        """Ask a question about the scene and return the answer as a JSON document, as :meth:`Fusion.json`.

        Args:
            question: The question.
            schema: A JSON schema, as in :meth:`Grammar.json`.
            deadline: Seconds from the call until the question stops, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`SceneOptions`.

        Returns:
            The document as Python objects.

        Raises:
            UsageError: The schema is invalid or has an unsupported keyword, or as in :meth:`ask`.
            DeadlineExceeded: The deadline passed before the document was complete.
            Cancelled: The question was canceled before the document was complete.
            FusionError: The document needs more than :attr:`Sampling.max_new_tokens`, or as in :meth:`ask`.
        """
        options["sampling"] = document_sampling(options, schema)
        return document(self.answer(question, deadline=deadline, on_stage=on_stage, **options))

    def prepare(self, question: str, **options: Unpack[SceneOptions]) -> PreparedQuestion:
        """Check the arguments of a question and tokenize its prompt, for :attr:`Fusion.pipeline`. Runs no graph.

        Args:
            question: The question.
            **options: See :class:`SceneOptions`.

        Raises:
            UsageError: As in :meth:`ask`.
            FusionError: As in :meth:`ask`.
        """
        self._check()
        return self._pipeline.prepare(self._entry, question, query_length=self.query_length, **options)

    def _check(self) -> None:
        """Raise an error if the model or the scene is closed, or the scene is evicted."""
        self._queue.check_open()
        self._entry.scene()

    def _start(self, prepared: PreparedQuestion, control: RunControl) -> AnswerStream:
        return AnswerStream(self._pipeline, self._queue, prepared, control)
