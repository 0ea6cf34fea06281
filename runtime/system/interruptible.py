"""Long C++ work that Ctrl-C ends.

Python runs signal handlers only in the main thread, between its own instructions. So the work runs in another thread.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

GRACE_SECONDS = 0.5
POLL_SECONDS = 0.2
Result = TypeVar("Result")

_abandoned: list[Future[Any]] = []


def interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Run ``work`` in a thread and return its result, while this thread handles signals.

    An exception that ends the wait, such as Ctrl-C's, calls ``cancel`` and gives the work :data:`GRACE_SECONDS` to end.
    Work that takes longer is abandoned: nothing can stop a thread.
    """
    outcome: Future[Result] = Future()
    try:
        Thread(target=_settle, args=(outcome, work), daemon=True).start()
        while not wait([outcome], POLL_SECONDS).done:  # a signal right before an endless wait would not end it
            pass
        return outcome.result()
    except BaseException:
        cancel()
        _abandoned.append(outcome)
        wait([outcome], GRACE_SECONDS)
        raise


def run_interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Return ``work()``.

    In the main thread, an exception of a signal handler, such as Ctrl-C's, calls ``cancel``, which must end the work.
    Returns only after the end of the work, so nothing uses its memory afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: Future[Result] = Future()
    try:
        _WORKER.submit(outcome, work)
        while not wait([outcome], POLL_SECONDS).done:
            pass
    except BaseException:
        if not outcome.cancel():  # it runs
            cancel()
            _wait_for_end(outcome)
        raise
    return outcome.result()


def _wait_for_end(outcome: Future[Any]) -> None:
    while not outcome.done():
        try:
            wait([outcome])
        except BaseException:  # a second signal ends nothing that the first has not ended
            continue


class _Worker:
    """A daemon thread that works for the main thread. It starts with the first work."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._thread: Thread | None = None

    def submit(self, outcome: Future[Any], work: Callable[[], Any]) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._run, name="fusion-edge worker", daemon=True)
            self._thread.start()
        self._work.put((outcome, work))

    def _run(self) -> None:
        while True:
            outcome, work = self._work.get()
            if outcome.set_running_or_notify_cancel():
                _settle(outcome, work)
            del outcome, work  # they may hold a model


_WORKER = _Worker()
os.register_at_fork(after_in_child=_WORKER.__init__)  # type: ignore[misc]  # the thread is the parent's


def is_abandoned() -> bool:
    """Return whether abandoned work still runs."""
    return not all(outcome.done() for outcome in _abandoned)


def leave_abandoned(code: int) -> int:
    """Return a command's exit code, or end the process with it: a normal exit would wait for abandoned work."""
    if is_abandoned():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the terminal may be closed
                stream.flush()
        os._exit(code)
    return code


def _settle(outcome: Future[Result], work: Callable[[], Result]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)
