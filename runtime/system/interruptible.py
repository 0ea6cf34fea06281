"""Long C++ work that Ctrl-C ends.

Python runs signal handlers only in the main thread, between its own instructions. So the work runs in another thread.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from fusion_edge.runtime.system.daemon_thread import DaemonThread

GRACE_SECONDS = 0.5
POLL_SECONDS = 0.2
Result = TypeVar("Result")

_abandoned: list[_Job[Any]] = []


def interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Run ``work`` in a thread and return its result, while this thread handles signals.

    An exception that ends the wait, such as Ctrl-C's, calls ``cancel`` and gives the work :data:`GRACE_SECONDS` to end.
    Work that takes longer is abandoned: nothing can stop a thread.
    """
    job = _Job(work)
    try:
        Thread(target=job.run, daemon=True).start()
        job.wait()
    except BaseException:
        cancel()
        _abandoned.append(job)
        job.wait(GRACE_SECONDS)
        raise
    return job.outcome()


def run_interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Return ``work()``.

    In the main thread, an exception of a signal handler, such as Ctrl-C's, calls ``cancel``, which must end the work.
    Returns only after the end of the work, so nothing uses its memory afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    _WORKER.start()
    job = _Job(work)
    try:
        _WORKER.put(job)
        job.wait()
    except BaseException:
        _end(job, cancel)
        raise
    return job.outcome()


def _end(job: _Job[Any], cancel: Callable[[], None]) -> None:
    """End a job, if it was put at all: the worker reaches the next one after it."""
    while True:
        try:
            job.work = None
            cancel()
            after = _Job(lambda: None)
            _WORKER.put(after)
            after.wait()
            job.error = None  # its traceback holds the job
            return
        except BaseException:  # a second signal ends nothing that the first has not ended
            continue


class _Job(Generic[Result]):
    """Work in another thread, and its outcome."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self.work: Callable[[], Result] | None = work
        """None to skip it."""
        self.error: BaseException | None = None
        self.is_done = False
        """Whether the work has ended."""
        self._results: list[Result] = []
        self._running = threading.Lock()  # Ctrl-C may leave it locked, so it tells nothing but when to look
        self._running.acquire()

    def run(self) -> None:
        """Do the work. Call it once."""
        try:
            if (work := self.work) is not None:
                self._results.append(work())
        except BaseException as error:
            self.error = error
        finally:
            self.work = None  # it may hold a model
            self.is_done = True
            self._running.release()

    def wait(self, seconds: float = math.inf) -> None:
        """Wait for the end of the work, at most ``seconds``, while this thread handles signals."""
        due = time.monotonic() + seconds
        while not self.is_done and (left := due - time.monotonic()) > 0:
            # A signal right before an endless wait would not end it.
            self._running.acquire(timeout=min(POLL_SECONDS, left))

    def outcome(self) -> Result:
        """Return the result of the work, or raise its error, which no longer holds the job afterwards."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
            return self._results[0]
        finally:
            del error


class _Worker:
    """A daemon thread that works for the main thread."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job[Any]] = SimpleQueue()
        self._thread = DaemonThread("fusion-edge worker", self._serve)

    def start(self) -> None:
        """Start the thread unless it runs."""
        self._thread.start()

    def put(self, job: _Job[Any]) -> None:
        """Have the thread do a job after all earlier ones."""
        self._jobs.put(job)

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            job.run()
            del job  # it may hold a model


_WORKER = _Worker()
os.register_at_fork(after_in_child=_WORKER.__init__)  # type: ignore[misc]  # the thread is the parent's


def is_abandoned() -> bool:
    """Return whether abandoned work still runs."""
    return not all(job.is_done for job in _abandoned)


def leave_abandoned(code: int) -> int:
    """Return a command's exit code, or end the process with it: a normal exit would wait for abandoned work."""
    if is_abandoned():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the terminal may be closed
                stream.flush()
        os._exit(code)
    return code
