"""The thread that runs the requests of an asker."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.arguments import check_timeout
from fusion_edge.runtime.errors import Cancelled, DeadlineExceeded, FusionError, Stopped, UsageError
from fusion_edge.runtime.loop.latencies import Latencies, LatencyRecorder, Outcome
from fusion_edge.runtime.loop.request import QueueFull, Request, Superseded
from fusion_edge.runtime.loop.waiting_queue import WaitingQueue, WhenFull
from fusion_edge.runtime.run_control import RunControl, StopReason

_LOGGER = logging.getLogger("fusion_edge")


class Worker:
    """Runs requests in a thread of its own, one at a time, and calls back in it."""

    def __init__(self, capacity: int, when_full: WhenFull, stop: Callable[[RunControl, StopReason], object]) -> None:
        """Start the thread. ``stop(control, reason)`` ends a run soon."""
        self.lock = threading.RLock()  # a signal handler may interrupt a thread that holds it
        self._work = threading.Condition(self.lock)
        self._room = threading.Condition(self.lock)
        self._queue = WaitingQueue[Request[Any]](capacity)
        self._when_full = when_full
        self._stop = stop
        self._running: Request[Any] | None = None
        self._calls: deque[Callable[[], object]] = deque()
        self._recorder = LatencyRecorder()
        self._is_closed = self._is_abandoned = self._has_ended = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="fusion-edge asker", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # no graph may run while the interpreter ends

    def submit(self, request: Request[Any], may_block: bool) -> None:
        """Queue a request. With ``wait``, a caller that ``may_block`` waits until it is within the capacity.

        Raises :class:`QueueFull` with ``refuse``, and as :meth:`check_open`.
        """
        with self.lock:
            self.check_open()
            self.expire()
            if (old := self._queue.replace(request)) is not None:
                self._stop_waiting(old, "superseded", Superseded, "A newer frame of the same key replaced this one.")
            elif self._when_full == "refuse" and self._queue.is_full:
                message = f"The queue is full: {len(self._queue)} requests wait; ask less often."
                self._stop_waiting(request, "dropped", QueueFull, message)
                request.result()  # raises it
            else:
                self._queue.append(request)
            if self._when_full == "drop_oldest" and len(self._queue) > self._queue.capacity:
                message = "The queue was full, and the request left it for a newer one; ask less often."
                self._stop_waiting(self._queue.drop(), "dropped", QueueFull, message)
            self._work.notify()
            if self._when_full == "wait" and may_block:
                self._wait_for_room(request)

    def _wait_for_room(self, request: Request[Any]) -> None:
        try:
            while self._queue.is_beyond(request):
                self.check_may_wait()
                due = min(waiting.control.due for waiting in self._queue)  # one that ends makes room
                self._room.wait(None if due == math.inf else max(0.0, due - time.monotonic()))
                self.expire()
        except BaseException:
            self.cancel(request)
            raise

    def _stop_waiting(self, request: Request[Any], outcome: Outcome, kind: type[Stopped], message: str) -> None:
        """End a request that has left the queue."""
        request.control.stop("cancelled")
        stopped = request.control.error()
        self._end(request, outcome, error=kind(message, stopped.stage, stopped.partial))

    def cancel(self, request: Request[Any]) -> None:
        """End a waiting request, and have a running one end soon. Do nothing in a forked process."""
        if self.is_inherited:
            return
        with self.lock:
            if self._queue.remove(request):
                request.control.stop("cancelled")
                self._end(request, "cancelled", error=request.control.error())
            if request.done:
                return
        self._stop(request.control, "cancelled")  # without the lock: the model has its own

    def expire(self) -> None:
        """End waiting requests whose deadline has passed. Do nothing in a forked process."""
        if self.is_inherited:
            return
        with self.lock:
            for request in self._queue:
                if request.control.reason == "deadline":
                    self._queue.remove(request)
                    self._end(request, "late", error=request.control.error())

    def check_may_wait(self) -> None:
        """Raise :class:`UsageError` in the worker's thread, which would wait for itself."""
        if threading.current_thread() is self._thread:
            raise UsageError("A callback cannot wait: the asker's thread, which runs it, would wait for itself.")

    def check_open(self) -> None:
        """Raise :class:`UsageError` once the asker is closed, and as :meth:`check_process`."""
        self.check_process()
        if self._is_closed:
            raise UsageError("This asker has been closed; make another.")

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked process: it lacks the thread, which may have held the lock forever."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raise :class:`FusionError` in a forked process."""
        if self.is_inherited:
            raise FusionError(
                f"This process is a fork of process {self._process}, which made the asker; make one after the fork."
            )

    def call(self, callback: Callable[[], object]) -> None:
        """Have the thread call ``callback``; call it here once the thread has ended."""
        with self.lock:
            if not self._has_ended:
                self._calls.append(callback)
                self._work.notify()
                return
        _call(callback)

    def latencies(self) -> Latencies:
        """Return the figures of all requests that have ended. Raise as :meth:`check_process`."""
        self.check_process()
        with self.lock:
            return self._recorder.latencies()

    def abandon(self) -> None:
        """End the thread after the requests that wait. Do nothing in a forked process."""
        if self.is_inherited:
            return
        with self.lock:
            self._is_abandoned = True
            self._work.notify()

    def close(self, timeout: float | None = None) -> None:
        """Cancel all requests and wait for the thread's end, ``timeout`` seconds at most.

        Raises :class:`UsageError` for a wrong ``timeout``, and :class:`FusionError` if the wait ends by it.
        """
        timeout = check_timeout(timeout)
        if self.is_inherited:
            return
        with self.lock:
            self._is_closed = True
            requests = [*self._queue, *([self._running] if self._running else [])]
            self._work.notify()
        for request in requests:
            self.cancel(request)
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise FusionError(f"A request still runs after {timeout:g} s; the asker is closed, and ends with it.")

    def _serve(self) -> None:
        while (request := self._next()) is not None:
            self._run(request)
            del request  # hold no frame while waiting for the next
        atexit.unregister(self.close)

    def _next(self) -> Request[Any] | None:
        """Call back, and return the next request; None at the end."""
        while True:
            self._call_back()
            with self.lock:
                self.expire()
                if self._queue and not self._calls:
                    self._running = self._queue.pop()
                    self._running.started = time.monotonic()
                    self._room.notify_all()
                    return self._running
                if not self._calls:
                    if self._is_closed or self._is_abandoned:
                        self._has_ended = True
                        return None
                    self._work.wait()

    def _call_back(self) -> None:
        while self._calls:
            _call(self._calls.popleft())

    def _run(self, request: Request[Any]) -> None:
        assert request.run is not None  # it has not ended
        try:
            value = request.run(request)
        except BaseException as error:  # also one that a consumer's on_stage raises; the thread must not end
            self._end(request, _outcome_of_error(error), error=_without_frames(error))
        else:
            self._end(request, _outcome_of_result(value), value)

    def _end(
        self, request: Request[Any], outcome: Outcome, value: object = None, *, error: BaseException | None = None
    ) -> None:
        with self.lock:
            if request is self._running:
                self._running = None
            self._room.notify_all()
            self._recorder.count(outcome)
            if request.is_unchanged:
                self._recorder.count("unchanged")
            elif outcome == "answered" and request.started is not None:
                first = None if request.first_piece is None else request.first_piece - request.submitted
                self._recorder.record(request.started - request.submitted, first, request.age)
            request.end(outcome, value, error)


def _outcome_of_result(value: object) -> Outcome:
    reason = value.finish_reason if isinstance(value, Answer) else "stop"
    return "late" if reason == "deadline" else "cancelled" if reason == "cancelled" else "answered"


def _outcome_of_error(error: BaseException) -> Outcome:
    return "late" if isinstance(error, DeadlineExceeded) else "cancelled" if isinstance(error, Cancelled) else "failed"


class WorkerTraceback(Exception):
    """The cause of an unexpected exception of the asker's thread: its traceback as text."""

    def __str__(self) -> str:
        return str(self.args[0])


def _without_frames(error: BaseException) -> BaseException:
    """Return an error without the frames that it passed, which hold pictures. A defect keeps its traceback as text."""
    if isinstance(error, FusionError):
        error.__cause__ = error.__context__ = None
    else:
        error.__cause__ = WorkerTraceback("\n" + "".join(traceback.format_exception(error)))
        error.__context__ = None
    return error.with_traceback(None)


def _call(callback: Callable[[], object]) -> None:
    try:
        callback()
    except BaseException:  # the thread must not end
        _LOGGER.exception("A callback raised an exception.")
