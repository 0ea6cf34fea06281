"""A lock that serves threads in order of arrival."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

POLL_SECONDS = 0.05
"""Time between two checks of a waiting thread."""
T = TypeVar("T")


class _Turn:
    """The place of a thread in the queue."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held until the work is done, or its thread gives up."""
        self.before: _Turn | None = None
        """The turn that the thread still waits for. If it gives up, the next thread waits for that instead."""


class FairLock:
    """Runs one piece of work at a time, in order of arrival.

    All locks are Python's own, held by ``with`` statements, so an exception at any moment, such as Ctrl-C, leaves none
    locked that another thread waits for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Held by the thread that works. The turns only order the threads."""
        self._last = _Turn()
        """The latest arrival."""
        self._guard = threading.Lock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds the lock, and would wait for itself."""
        return self._lock.locked() and self._owner == threading.get_ident()

    def run(self, work: Callable[[], T], check: Callable[[], None] = lambda: None, due: float = math.inf) -> T:
        """Return ``work()``, called after all earlier work.

        While the thread waits, it calls ``check`` now and then, and at ``due`` (seconds of ``time.monotonic``). An
        exception of ``check`` ends the wait.
        """
        mine = _Turn()
        with mine.lock:
            with self._guard:
                mine.before, self._last = self._last, mine
            while (before := mine.before) is not None:
                _wait(before.lock, check, due)
                mine.before = before.before
            return self.run_next(work)

    def run_next(self, work: Callable[[], T], timeout: float | None = None) -> T:
        """Return ``work()``, called after the current work and ahead of the queue.

        Raises ``TimeoutError`` if the current work takes longer than ``timeout`` seconds.
        """
        me = threading.get_ident()
        if timeout is not None:
            self._wait(timeout)
        with self._lock:
            self._owner = me
            try:
                return work()
            finally:
                self._owner = None

    def _wait(self, timeout: float) -> None:
        """Wait until nothing works. ``acquire`` with a timeout could leave the lock locked after Ctrl-C."""
        due = time.monotonic() + timeout
        while self._lock.locked():
            if time.monotonic() >= due:
                raise TimeoutError
            time.sleep(0.005)


def _wait(lock: threading.RLock, check: Callable[[], None], due: float) -> None:
    """Wait until another thread releases ``lock``."""
    try:
        while not lock.acquire(timeout=min(POLL_SECONDS, max(0.0, due - time.monotonic()))):
            check()
    finally:
        try:  # noqa: SIM105  # a context manager's own calls would be moments for Ctrl-C to leave it locked
            lock.release()
        except RuntimeError:  # not acquired
            pass
