"""Questions from a robot's loop, which never waits for an answer.

with fusion_edge.load("BUNDLE") as fusion, fusion_edge.Asker(fusion) as asker:
    request = asker.submit(frame, "Is the path clear?", key="front", deadline=0.5)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.arguments import check_flag, check_integer, is_integer, short_repr
from fusion_edge.runtime.choices import Choice
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loop.last_answers import LastAnswers
from fusion_edge.runtime.loop.latencies import Latencies
from fusion_edge.runtime.loop.request import ChoiceRequestOptions, Request, RequestOptions, Run
from fusion_edge.runtime.loop.waiting_queue import WhenFull
from fusion_edge.runtime.loop.worker import Worker
from fusion_edge.runtime.requests import ImageLike
from fusion_edge.runtime.run_control import RunControl
from fusion_edge.runtime.scene import Scene
from fusion_edge.runtime.structured import document, document_sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack


T = TypeVar("T")
Source = ImageLike | Scene
"""What a question is about."""
Ask = Callable[[Fusion, Source, str, dict[str, Any], Request[T]], T]
"""Asks the question of a request, with options."""


class Asker:
    """Asks a model in a thread of its own, so a robot's loop never waits.

    Requests wait in a queue. The highest priority runs first, among equals the oldest. A newer request of the same key
    replaces one that waits, and takes its place: of each camera only the newest frame is asked about, and cameras of
    different rates take turns. Any thread may submit. Other code may ask the model, too.

    An asker that is garbage answers the requests that wait, then ends.
    """

    def __init__(
        self,
        fusion: Fusion,
        *,
        capacity: int = 8,
        when_full: WhenFull = "drop_oldest",
        skip_unchanged: bool = False,
    ) -> None:
        """Start the thread.

        Args:
            fusion: The model. Closing the asker leaves it open.
            capacity: Limit of requests that wait.
            when_full: What happens to a request that finds no room. ``drop_oldest``: the oldest waiting request of the
                lowest priority leaves with :class:`QueueFull`. ``refuse``: :meth:`submit` raises :class:`QueueFull`.
                ``wait``: :meth:`submit` waits for room, or for its deadline.
            skip_unchanged: Whether a frame, an array, gets the last answer of its key again if it has the same pixels
                and the question is the same. :attr:`Request.is_unchanged` says so. Keeps a frame for each of 16 keys.

        Raises:
            UsageError: An argument has a wrong type or is out of range.
        """
        capacity = check_integer("capacity", capacity, 1, "an integer from 1")
        if when_full not in get_args(WhenFull):
            expected = ", ".join(map(repr, get_args(WhenFull)))
            raise UsageError(f"when_full is {short_repr(when_full)}; expected one of {expected}.")
        self._last = LastAnswers() if check_flag("skip_unchanged", skip_unchanged) else None
        self._fusion = fusion
        self._worker = Worker(capacity, when_full, fusion.queue.stop)
        weakref.finalize(self, self._worker.abandon).atexit = False

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, source: Source, question: str, **options: Unpack[RequestOptions]) -> Request[Answer]:
        """Queue a question, and return at once (but see ``when_full``).

        Args:
            source: An image as in :meth:`Fusion.ask`, or a scene of the model. An array is copied, so the camera may
                reuse its buffer. Anything else must stay unchanged until the request has ended.
            question: The question.
            **options: See :class:`RequestOptions`.

        Returns:
            The request. :meth:`Request.result` raises the errors of the image and the question.

        Raises:
            UsageError: ``key``, ``deadline``, ``priority`` or ``on_stage`` has a wrong type or is out of range, or the
                asker is closed.
            QueueFull: The queue is full, with ``refuse``.
            FusionError: This process is a fork of the one that made the asker.
        """
        return self._submit(_answer, source, question, {**options})

    def submit_json(
        self, source: Source, question: str, schema: dict[str, Any], **options: Unpack[RequestOptions]
    ) -> Request[Any]:
        """Queue a question whose result is a JSON document, as :meth:`Fusion.json` returns it.

        Args:
            source: As in :meth:`submit`.
            question: The question.
            schema: As in :meth:`Fusion.json`.
            **options: See :class:`RequestOptions`.

        Returns:
            The request. It has no pieces.

        Raises:
            UsageError: The schema is invalid or has an unsupported keyword, or as in :meth:`submit`.
            QueueFull: As in :meth:`submit`.
            FusionError: As in :meth:`submit`.
        """
        options["sampling"] = document_sampling(options, schema)
        return self._submit(_json, source, question, {**options})

    def submit_choose(
        self, source: Source, question: str, choices: Sequence[str], **options: Unpack[ChoiceRequestOptions]
    ) -> Request[Choice]:
        """Queue a choice between answers, as :meth:`Fusion.choose` makes it.

        Args:
            source: As in :meth:`submit`.
            question: The question.
            choices: As in :meth:`Fusion.choose`.
            **options: See :class:`ChoiceRequestOptions`.

        Returns:
            The request. It has no pieces. :meth:`Request.result` raises the errors of the choices, too.

        Raises:
            UsageError: As in :meth:`submit`.
            QueueFull: As in :meth:`submit`.
            FusionError: As in :meth:`submit`.
        """
        fixed = tuple(choices) if isinstance(choices, list) else choices
        return self._submit(_choose, source, question, {**options, "choices": fixed})

    def submit_run(self, run: Run[T], deadline: float | None = None) -> Request[T]:
        """Queue a function that asks the model itself, and return at once (but see ``when_full``).

        Args:
            run: Called with the request in the asker's thread. It obeys :attr:`Request.control`, passes pieces of an
                answer to :meth:`Request.push` and returns the result.
            deadline: Seconds from the call until the request ends, waiting or running. Default: none.

        Raises:
            UsageError: As in :meth:`submit`.
            QueueFull: As in :meth:`submit`.
            FusionError: As in :meth:`submit`.
        """
        self._worker.check_open()
        request = Request(self._worker, run, None, 0, RunControl(deadline))
        self._worker.submit(request, may_block=True)
        return request

    async def ask(self, source: Source, question: str, **options: Unpack[RequestOptions]) -> Answer:
        """Ask a question in an event loop, and return the answer. Canceling the task cancels the question.

        The loop is never blocked, also with ``wait``.

        Args:
            source: As in :meth:`submit`.
            question: The question.
            **options: See :class:`RequestOptions`.

        Raises:
            UsageError: As in :meth:`submit`.
            QueueFull: As in :meth:`submit`.
            FusionError: As in :meth:`Request.result`.
        """
        request = self._submit(_answer, source, question, {**options}, may_block=False)
        try:
            return await request
        finally:
            request.cancel()

    def latencies(self) -> Latencies:
        """Return percentiles of the latest answers' latencies, and how many requests ended in which way."""
        return self._worker.latencies()

    def close(self, timeout: float | None = None) -> None:
        """Cancel all requests, and wait for the end of the thread. Closing again does nothing. The model stays open.

        Args:
            timeout: Limit of the wait in seconds. Default: none.

        Raises:
            UsageError: ``timeout`` is no number from 0.
            FusionError: A request runs longer than ``timeout``. The asker is closed, and ends with the request.
        """
        self._worker.close(timeout)

    def _submit(
        self, ask: Ask[T], source: Source, question: str, options: dict[str, Any], may_block: bool = True
    ) -> Request[T]:
        """Check the arguments that concern the queue, copy what the caller may change, and queue the request."""
        self._worker.check_open()
        key, priority = options.pop("key", None), options.pop("priority", 0)
        control = RunControl(options.pop("deadline", None), options.pop("on_stage", None))
        _check_key(key)
        if not is_integer(priority):
            raise UsageError(f"priority is {short_repr(priority)}; expected an integer.")
        if isinstance(history := options.get("history"), list):
            options["history"] = history.copy()
        if isinstance(source, Scene) and not source.is_of(self._fusion.queue):
            raise UsageError("The scene is of another model than the asker's; look with this model.")
        if isinstance(source, np.ndarray):
            source = source.copy()  # 0.7 ms for 1920 x 1080; cutting the crops here would take 70 ms
        run: Run[T] = partial(ask, self._fusion, source, question, options)
        if self._last is not None and key is not None and isinstance(source, np.ndarray):
            run = partial(self._last.once, run, key, source, (ask, question, options))
        request = Request(self._worker, run, key, int(priority), control)
        self._worker.submit(request, may_block)
        return request


def _answer(fusion: Fusion, source: Source, question: str, options: dict[str, Any], request: Request[Answer]) -> Answer:
    return _answer_in_pieces(fusion, source, question, options, request.control, request.push)


def _json(fusion: Fusion, source: Source, question: str, options: dict[str, Any], request: Request[Any]) -> Any:
    return document(_answer_in_pieces(fusion, source, question, options, request.control, lambda _: None))


def _answer_in_pieces(
    fusion: Fusion,
    source: Source,
    question: str,
    options: dict[str, Any],
    control: RunControl,
    when_piece: Callable[[str], object],
) -> Answer:
    if isinstance(source, Scene):
        return source.answer_under(control, when_piece, question, **options)
    return fusion.answer_under(control, when_piece, source, question, **options)


def _choose(fusion: Fusion, source: Source, question: str, options: dict[str, Any], request: Request[Choice]) -> Choice:
    if isinstance(source, Scene):
        return source.choose_under(request.control, [question], **options)[0]
    return fusion.choose_under(request.control, source, [question], **options)[0]


def _check_key(key: Hashable) -> None:
    try:
        hash(key)
    except TypeError:
        raise UsageError(f"key is {short_repr(key)}; expected a value with a hash, such as a text.") from None
