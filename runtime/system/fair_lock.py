"""A lock that serves threads in the order in which they came."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class FairLock:
    """One piece of work at a time, in the order in which they were handed in.

    Only locks of Python's own are taken, each by a ``with`` statement: an exception that comes at any moment, such as
    Ctrl-C, leaves none of them locked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Held by whoever works. The others only make the order: interrupted in a queue, one holds nobody back."""
        self._last = threading.Lock()
        """Held by whoever came last, until its work is done."""
        self._guard = threading.Lock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread is working under the lock: it would wait for itself."""
        return self._lock.locked() and self._owner == threading.get_ident()

    def run(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, called once all that was handed in before is done."""
        mine = threading.Lock()
        with mine:
            with self._guard:
                before, self._last = self._last, mine
            with before:
                pass
            return self.run_next(work)

    def run_next(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, called once what is being worked on is done, ahead of all that waits."""
        me = threading.get_ident()
        with self._lock:
            self._owner = me
            try:
                return work()
            finally:
                self._owner = None
