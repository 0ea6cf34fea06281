"""A loaded model, which answers questions about images."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from tokenizers import Tokenizer

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.answer_stream import AnswerStream
from fusion_edge.runtime.arguments import check_flag, check_integer
from fusion_edge.runtime.backends.base import Backend
from fusion_edge.runtime.backends.devices import Device
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.choices import Choice, PreparedChoices, choose, prepare_choices
from fusion_edge.runtime.conversation import Conversation
from fusion_edge.runtime.image_cache import CacheEntry
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image
from fusion_edge.runtime.pipeline import Embed, Pipeline
from fusion_edge.runtime.request_queue import RequestQueue
from fusion_edge.runtime.requests import Color, ImageLike, PreparedQuestion
from fusion_edge.runtime.run_control import RunControl
from fusion_edge.runtime.scene import Scene
from fusion_edge.runtime.stages import ENCODE_GLOBAL
from fusion_edge.runtime.structured import document, document_sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusion_edge.runtime.requests import ChoiceOptions, QuestionOptions


class Fusion:
    """A loaded model.

    Several threads may ask. Their questions run one at a time, in order of arrival. A new question ends an
    :class:`AnswerStream` that has pieces left.

    The features of the latest images are cached, so a follow-up question about the same pixels skips most of the vision
    encoder. :meth:`look` also keeps what the image tokens need.

    After a fork the child cannot use the model: :meth:`close` does nothing there, and everything else raises
    :class:`FusionError`.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        tokenizer: Tokenizer,
        embed: Embed,
        device: Device | None = None,
        cached_images: int = 1,
    ) -> None:
        """Wrap a custom backend. To load a bundle, use :func:`load`.

        Args:
            manifest: Manifest of the bundle.
            backend: Runs the graphs. :meth:`close` closes it.
            tokenizer: Tokenizer of the bundle.
            embed: Maps token ids int64 ``[n]`` to embeddings float32 ``[n,D]``.
            device: Runs the graphs. Default: a device with the backend's name.
            cached_images: As in :func:`load`.

        Raises:
            UsageError: ``cached_images`` is no integer from 1.
            FusionError: The tokenizer does not fit the bundle's template.
        """
        self.manifest = manifest
        self.backend = backend
        self.device = Device(backend.name) if device is None else device
        """Device that runs the model. ``not_taken`` has the reasons against better ones, ``remark`` why it is slow."""
        self.tokenizer = tokenizer
        self.embed = embed
        images = check_integer("cached_images", cached_images, 1, "an integer from 1")
        self.pipeline = Pipeline(manifest, backend, tokenizer, embed, images)
        self.queue = RequestQueue(backend, self.pipeline.close)

    @property
    def config(self) -> FusionConfig:
        """The model's configuration."""
        return self.manifest.model

    @property
    def max_context(self) -> int:
        """Size of the KV cache in tokens, prompt and answer together."""
        return self.pipeline.max_context

    def __enter__(self) -> Fusion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """Cancel the question that runs, and the current stream. Any thread may call this; it does not wait.

        A graph ends within a fraction of a second. What was computed for the image stays cached. Questions that wait
        for their turn are not canceled.
        """
        self.queue.stop_all("cancelled")

    def close(self, timeout: float | None = None) -> None:
        """Cancel what runs, wait for its end, and free the model's memory. Closing again does nothing.

        A question that runs in another thread raises :class:`Cancelled`.

        Args:
            timeout: Limit of the wait in seconds. Default: none.

        Raises:
            UsageError: ``timeout`` is no number from 0.
            FusionError: The question runs longer than ``timeout``. The model is closed, and is freed when it ends.
        """
        self.queue.close(timeout)

    def __del__(self) -> None:
        """Keep everything in a forked process: ONNX Runtime would wait for threads that only its parent has."""
        queue = self.__dict__.get("queue")  # absent if the load failed
        if queue is not None and queue.is_inherited:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.__dict__))

    def ask(
        self,
        image: ImageLike,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[QuestionOptions],
    ) -> Iterator[str]:
        """Ask a question about an image and return the answer piece by piece, as it is generated.

        Args:
            image: Path of an image file, Pillow image, or array: ``[H,W,3]``, ``[H,W,1]`` or ``[H,W]`` of uint8,
                uint16, booleans, or floats from 0 to 1.
            question: The question.
            deadline: Seconds from the call until the answer ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.
            **options: See :class:`QuestionOptions`.

        Returns:
            Pieces of text. Their concatenation is the answer; a returned piece never changes.

        Raises:
            UsageError: An argument has a wrong type or is out of range, or the model is closed.
            FusionError: The image cannot be read, or the conversation does not fit the context.
            DeadlineExceeded: The deadline passed before the answer began.
            Cancelled: The question was canceled before the answer began, or the model was closed.
        """
        return self.stream(image, question, deadline=deadline, on_stage=on_stage, **options)

    def answer(
        self,
        image: ImageLike,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[QuestionOptions],
    ) -> Answer:
        """Ask a question about an image and return the answer.

        A deadline or a cancel ends it early; :attr:`Answer.finish_reason` says so. Arguments and errors are those of
        :meth:`ask`.
        """
        return self.answer_under(RunControl(deadline, on_stage), lambda _: None, image, question, **options)

    def answer_under(
        self,
        control: RunControl,
        when_piece: Callable[[str], object],
        image: ImageLike,
        question: str,
        **options: Unpack[QuestionOptions],
    ) -> Answer:
        """Answer as :meth:`answer` does, under the caller's control, and pass each piece to ``when_piece``."""
        prepared = self._prepare(image, question, **options)
        return self.queue.run(lambda: self._start(prepared, control).complete(when_piece), control)

    def stream(
        self,
        image: ImageLike,
        question: str,
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[QuestionOptions],
    ) -> AnswerStream:
        """Ask a question about an image and return a stream of the answer's pieces.

        After the last piece, :attr:`AnswerStream.answer` is the complete answer. A question that raises an error does
        not end the previous stream. Arguments and errors are those of :meth:`ask`.
        """
        control = RunControl(deadline, on_stage)
        prepared = self._prepare(image, question, **options)
        return self.queue.run(lambda: self._start(prepared, control), control)

    @overload
    def choose(
        self,
        image: ImageLike,
        question: str,
        choices: Sequence[str],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[ChoiceOptions],
    ) -> Choice: ...

    @overload
    def choose(
        self,
        image: ImageLike,
        question: list[str] | tuple[str, ...],
        choices: Sequence[str],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[ChoiceOptions],
    ) -> list[Choice]: ...

    def choose(
        self,
        image: ImageLike,
        question: str | list[str] | tuple[str, ...],
        choices: Sequence[str],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[ChoiceOptions],
    ) -> Choice | list[Choice]:
        """Ask which of several answers is right, and how sure the model is. Generates no answer.

        The probability of a choice is the product of its tokens' probabilities behind the prompt, without length
        normalization, divided by that of all choices. It costs one prefill, and a decode step for every token that is
        not the last one of a choice; common first tokens of choices share theirs.

        A list of questions is asked one after another. ``choices`` are 2 to 256 answers; none may be the start of
        another, and whitespace around them does not count. Other arguments are those of :meth:`ask`; for ``options``
        see :class:`ChoiceOptions`.

        Returns:
            The choice; for a list, one per question.

        Raises:
            UsageError: As in :meth:`ask`, or a choice is empty, equal to another, or the start of another.
            FusionError: As in :meth:`ask`, or a choice does not fit the context.
        """
        questions = question if isinstance(question, list | tuple) else (question,)
        chosen = self.choose_under(RunControl(deadline, on_stage), image, questions, choices, **options)
        return chosen if questions is question else chosen[0]

    def choose_under(
        self,
        control: RunControl,
        image: ImageLike,
        questions: Sequence[str],
        choices: Sequence[str],
        **options: Unpack[ChoiceOptions],
    ) -> list[Choice]:
        """Choose as :meth:`choose` does, under the caller's control."""
        self.queue.check_open()
        prepared = prepare_choices(self.pipeline, image, questions, choices, **options)
        return [self.queue.run(partial(self._choose, one, control), control) for one in prepared]

    def json(
        self,
        image: ImageLike,
        question: str,
        schema: dict[str, Any],
        *,
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Unpack[QuestionOptions],
    ) -> Any:
        """Ask a question and return the answer as a JSON document that ``schema`` allows.

        The model does not see the schema: ask for its content in the question. Needs the extra ``constrained``.

        ``schema`` is a JSON schema, as in :meth:`Grammar.json`. Other arguments are those of :meth:`ask`.

        Returns:
            The document as Python objects.

        Raises:
            UsageError: The schema is invalid or has an unsupported keyword, or as in :meth:`ask`.
            FusionError: The document was not complete at :attr:`Sampling.max_new_tokens`, at the deadline
                (:class:`DeadlineExceeded`) or when it was canceled (:class:`Cancelled`), or as in :meth:`ask`.
        """
        options["sampling"] = document_sampling(options, schema)
        return document(self.answer(image, question, deadline=deadline, on_stage=on_stage, **options))

    def conversation(self, image: ImageLike, color: Color = "rgb", *, control_tokens: bool = False) -> Conversation:
        """Start a conversation about one image.

        Args:
            image: As in :meth:`ask`.
            color: Layout of an array, as in :class:`QuestionOptions`.
            control_tokens: As in :class:`QuestionOptions`, for every question.

        Raises:
            UsageError: As in :meth:`ask`.
            FusionError: The image cannot be read.
        """
        self.queue.check_open()
        is_markup = check_flag("control_tokens", control_tokens)
        return Conversation(self.pipeline, self.queue, load_image(image, color), is_markup)

    def look(
        self,
        image: ImageLike,
        guide: str | None = None,
        *,
        query_length: int | None = None,
        color: Color = "rgb",
        deadline: float | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Scene:
        """Look at an image, for many questions about it.

        With a guide, a question of the scene then runs little more than its own tokens; a stream that has pieces left
        ends. A look that stops early leaves the image's features cached.

        Args:
            image: As in :meth:`ask`.
            guide: Text that guides the vision encoder in place of the questions, also an empty one. Default: each
                question is its own guide, as in :meth:`ask`.
            query_length: Number of latents, one of the bundle's query lengths. Default: the first.
            color: Layout of an array, as in :class:`QuestionOptions`.
            deadline: Seconds from the call until the look ends, also within a graph. Default: none.
            on_stage: Called with the name of each stage as it begins, in the thread that asks. Default: none.

        Raises:
            UsageError: An argument has a wrong type or is out of range, or the model is closed.
            FusionError: The image cannot be read, or the guide does not fit the context.
            DeadlineExceeded, Cancelled: The look was stopped.
        """
        control = RunControl(deadline, on_stage)
        self.queue.check_open()
        prepared = self.pipeline.prepare_look(image, guide, query_length, color)

        def look() -> CacheEntry:
            self.queue.check_open()
            if guide is not None:
                self.queue.start(control)  # the sequence ends
            return self.pipeline.look(prepared, control.stage_hook)

        entry = self.queue.run(look, control)
        return Scene(self.pipeline, self.queue, entry, guide, prepared.query_length)

    def encode_image(self, image: ImageLike, color: Color = "rgb") -> None:
        """Encode an image ahead of the first question about it, and cache its features.

        A question about the same pixels then skips most of the vision encoder. A stream that has pieces left continues.

        Args:
            image: As in :meth:`ask`.
            color: Layout of an array, as in :class:`QuestionOptions`.

        Raises:
            UsageError: An argument has a wrong type or is out of range, or the model is closed.
            FusionError: The image cannot be read.
            Cancelled: The encoding was canceled, or the model was closed.
        """
        self.queue.check_open()
        crops, control = cut_crops(load_image(image, color)), RunControl()

        def encode() -> None:
            self.queue.check_open()
            with control.stage_hook(ENCODE_GLOBAL):
                self.pipeline.encode_image(crops)

        self.queue.run(encode, control)

    def clear_image_cache(self) -> None:
        """Drop all cached images and scenes, so the next question encodes its image again."""
        self.queue.run(self.pipeline.clear_image_cache, RunControl())

    def query_length(self, length: int | None = None) -> int:
        """Return ``length``, by default the bundle's first. Raise :class:`UsageError` if the bundle lacks it."""
        return self.pipeline.query_length(length)

    def _prepare(self, image: ImageLike, question: str, **options: Unpack[QuestionOptions]) -> PreparedQuestion:
        self.queue.check_open()
        return self.pipeline.prepare(image, question, **options)

    def _choose(self, prepared: PreparedChoices, control: RunControl) -> Choice:
        self.queue.start(control)
        return choose(self.pipeline, prepared, control)

    def _start(self, prepared: PreparedQuestion, control: RunControl) -> AnswerStream:
        return AnswerStream(self.pipeline, self.queue, prepared, control)
