"""A request: a question that waits for the worker, runs, and ends with a result or an error."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Hashable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Protocol, TypedDict, TypeVar, cast

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.arguments import check_timeout
from fusion_edge.runtime.errors import FusionError, Stopped
from fusion_edge.runtime.loop.latencies import Outcome
from fusion_edge.runtime.requests import ChoiceOptions, QuestionOptions
from fusion_edge.runtime.run_control import RunControl

T = TypeVar("T")
Run = Callable[["Request[T]"], T]
"""Runs the question of a request under its control, pushes the pieces of the answer, and returns the result."""

EXPIRY_SLACK = 0.001
"""Seconds by which a timer fires after a deadline, because event loops may be early by their clock's resolution."""


class QueueOptions(TypedDict, total=False):
    """Keyword arguments of every request."""

    key: Hashable
    """Camera or purpose, such as ``"front"`` or ``("front", "people")``. A newer request of an equal key replaces one
    that waits, which ends with :class:`Superseded`. Default: None, which replaces nothing."""
    deadline: float | None
    """Seconds from the call until the request ends, waiting or running. Default: none."""
    priority: int
    """Higher runs earlier. What runs is not interrupted. Default: 0."""
    on_stage: Callable[[str], None] | None
    """Called in the asker's thread with the name of each stage as it begins. An exception ends the request."""


class RequestOptions(QuestionOptions, QueueOptions, total=False):
    """Keyword arguments of :meth:`Asker.submit`, :meth:`Asker.ask` and :meth:`Asker.submit_json`."""


class ChoiceRequestOptions(ChoiceOptions, QueueOptions, total=False):
    """Keyword arguments of :meth:`Asker.submit_choose`."""


class Superseded(Stopped):
    """A request that a newer frame of its key replaced while it waited."""


class QueueFull(Stopped):
    """A request that found no room in the queue, or left it to make room."""


class Owner(Protocol):
    """The worker, as its requests see it."""

    lock: threading.RLock
    """Guards the state of all requests. Taken by ``with``, never through a condition: its ``__enter__`` is Python code,
    where Ctrl-C could leave the lock locked."""

    def cancel(self, request: Request[Any]) -> None:
        """End a waiting request; have a running one end soon."""
        ...

    def expire(self) -> None:
        """End waiting requests whose deadline has passed."""
        ...

    def check_process(self) -> None:
        """Raise :class:`FusionError` in a forked process, which has no worker: a wait there would never end."""
        ...

    def check_may_wait(self) -> None:
        """Raise :class:`UsageError` in the worker's thread, which would wait for itself."""
        ...

    def call(self, callback: Callable[[], object]) -> None:
        """Have the worker's thread call ``callback``."""
        ...


class Request(Generic[T]):
    """A question that :meth:`Asker.submit` queued. Any thread may use it.

    Iteration yields the answer's pieces as they are generated, any number of times; ``async for`` does the same in an
    event loop. ``await request`` returns what :meth:`result` returns.
    """

    def __init__(self, owner: Owner, run: Run[T], key: Hashable, priority: int, control: RunControl) -> None:
        self.key = key
        """Camera or purpose. A newer request of the same key replaces this one while it waits."""
        self.priority = priority
        """Higher runs earlier."""
        self.is_unchanged = False
        """Whether the result is the last answer again, because the frame is the same (``skip_unchanged``)."""
        self.control = control
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first_piece: float | None = None
        self.outcome: Outcome | None = None
        self.run: Run[T] | None = run
        self._owner = owner
        self._changed = threading.Condition(owner.lock)
        self._pieces: list[str] = []
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Request[T]], object]] = []
        self._listeners: list[Callable[[], object]] = []

    @property
    def stage(self) -> str:
        """``waiting``, then the stage of the model that runs; after the end, the last one."""
        return self.control.stage

    @property
    def age(self) -> float:
        """Seconds since the request, and so its frame, was submitted."""
        return time.monotonic() - self.submitted

    @property
    def done(self) -> bool:
        """Whether the request has ended, with a result or an error."""
        if self.is_waiting and self.control.reason == "deadline":
            self._owner.expire()
        return self.outcome is not None

    def cancel(self) -> None:
        """End the request. One that runs ends within a fraction of a second; one that has ended stays as it is."""
        self._owner.cancel(self)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result. An answer that a deadline or a cancel cut short is a result, too.

        Args:
            timeout: Seconds to wait. Default: until the request ends.

        Raises:
            TimeoutError: The request has not ended within ``timeout``; it goes on.
            Superseded: A newer frame of the same key came while this one waited.
            QueueFull: The request left a full queue.
            Cancelled: The request was cancelled, or the asker closed, before the answer began.
            DeadlineExceeded: The deadline passed before the answer began.
            UsageError: ``timeout`` is not a number from 0, an argument of the question is wrong, or a callback waits.
            FusionError: As in :meth:`Fusion.ask`.
        """
        seconds = check_timeout(timeout)
        limit = None if seconds is None else time.monotonic() + seconds
        self._owner.check_process()
        with self._owner.lock:
            self._wait(lambda: self.done, limit)
            return self._ended()

    def add_done_callback(self, callback: Callable[[Request[T]], object]) -> None:
        """Have the asker's thread call ``callback(request)`` after the request's end, between two questions.

        Keep it short: the next question waits for it. It may submit, but not wait. An exception is logged.
        """
        self._owner.check_process()
        with self._owner.lock:
            if not self.done:
                self._callbacks.append(callback)
                return
        self._owner.call(partial(callback, self))  # without the lock: once the thread has ended, it calls here

    def __iter__(self) -> Iterator[str]:
        self._owner.check_process()
        position = 0
        while True:
            with self._owner.lock:
                self._wait(partial(self._has, position), None)
                piece = self._piece(position)
            if piece is None:
                return
            yield piece
            position += 1

    async def __aiter__(self) -> AsyncIterator[str]:
        position = 0
        while True:
            await self._until(partial(self._has, position))
            if (piece := self._piece(position)) is None:
                return
            yield piece
            position += 1

    def __await__(self) -> Generator[Any, None, T]:
        yield from self._until(lambda: self.done).__await__()
        return self._ended()

    # For the worker, which holds the lock.

    @property
    def is_waiting(self) -> bool:
        """Whether the request has neither started nor ended."""
        return self.started is None and self.outcome is None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if math.isinf(self.control.due) else max(0.0, self.control.due - time.monotonic())

    def push(self, piece: str) -> None:
        """Append a piece of the answer. Needs no lock."""
        with self._owner.lock:
            self.first_piece = self.first_piece or time.monotonic()
            self._pieces.append(piece)
            self._notify()

    def repeat(self, answer: object) -> None:
        """Mark the result as the last answer again. Needs no lock."""
        self.is_unchanged = True
        if isinstance(answer, Answer) and answer.text:
            self.push(answer.text)

    def end(self, outcome: Outcome, value: T | None = None, error: BaseException | None = None) -> None:
        """End the request, and let go of its frame."""
        self.outcome, self._value, self._error = outcome, value, error
        self.run = None
        self._notify()
        for callback in self._callbacks:
            self._owner.call(partial(callback, self))
        self._callbacks.clear()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in tuple(self._listeners):  # garbage collection may remove one meanwhile
            wake()

    def _has(self, position: int) -> bool:
        return self.done or len(self._pieces) > position

    def _piece(self, position: int) -> str | None:
        """Return a piece; None at the end of the answer. Raise the error of a request behind its last piece."""
        if position < len(self._pieces):
            return self._pieces[position]
        self._ended()
        return None

    def _ended(self) -> T:
        """Return the result of a request that has ended, or raise its error."""
        if self._error is not None:
            raise _again(self._error)
        return cast("T", self._value)

    def _wait(self, is_ready: Callable[[], bool], limit: float | None) -> None:
        """Wait in a thread that holds the lock, until ``limit`` at most. A deadline ends a request that waits."""
        while not is_ready():
            self._owner.check_may_wait()
            self._owner.expire()
            if self.done:
                continue
            now = time.monotonic()
            if limit is not None and now >= limit:
                raise TimeoutError(f"The request has not ended after {self.age:.3g} s; its stage is {self.stage!r}.")
            ends = [] if limit is None else [limit]
            if self.is_waiting and not math.isinf(self.control.due):
                ends.append(self.control.due)
            self._changed.wait(max(0.0, min(ends) - now) if ends else None)

    async def _until(self, is_ready: Callable[[], bool]) -> None:
        """Wait in an event loop. A deadline ends a request that waits."""
        import asyncio  # only programs that use it spend the time

        self._owner.check_process()
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        seconds = self.seconds_left
        timer = None if seconds is None else loop.call_later(seconds + EXPIRY_SLACK, self._owner.expire)
        with self._owner.lock:
            self._listeners.append(wake)
        try:
            while not is_ready():
                await changed.wait()
                changed.clear()
        finally:
            if timer is not None:
                timer.cancel()
            with self._owner.lock:
                self._listeners.remove(wake)


def _again(error: BaseException) -> BaseException:
    """Return a copy of an error for one raise. The error itself would keep the frames of all who caught it."""
    if not isinstance(error, FusionError):
        return error.with_traceback(None)
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(vars(error))
    return copy
