"""A lock that serves threads in order of arrival."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class FairLock:
    """Runs one piece of work at a time, in order of arrival.

    All locks are Python's own, held by ``with`` statements, so an exception at any moment, such as Ctrl-C, leaves none
    locked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Held by the thread that works. The other locks only order the threads."""
        self._last = threading.Lock()
        """Held by the latest arrival until its work is done."""
        self._guard = threading.Lock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds the lock, and would wait for itself."""
        return self._lock.locked() and self._owner == threading.get_ident()

    def run(self, work: Callable[[], T]) -> T:
        """Return ``work()``, called after all earlier work."""
        mine = threading.Lock()
        with mine:
            with self._guard:
                before, self._last = self._last, mine
            with before:
                pass
            return self.run_next(work)

    def run_next(self, work: Callable[[], T]) -> T:
        """Return ``work()``, called after the current work and ahead of the queue."""
        me = threading.get_ident()
        with self._lock:
            self._owner = me
            try:
                return work()
            finally:
                self._owner = None
