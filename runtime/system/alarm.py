"""Calls at a given time, from one daemon thread of the process. The thread starts with the first call."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from fusion_edge.runtime.system.daemon_thread import DaemonThread


class AlarmThread:
    """Calls functions when their time has come.

    It has no lock that Ctrl-C could leave locked: its dictionary and its queue are atomic.
    """

    def __init__(self) -> None:
        self._calls: dict[object, tuple[float, Callable[[], None]]] = {}
        self._wakes_at = math.inf
        self._changes: SimpleQueue[None] = SimpleQueue()
        self._thread = DaemonThread("fusion-edge alarm", self._watch)

    @contextmanager
    def calling(self, when: float, function: Callable[[], None]) -> Iterator[None]:
        """Call ``function`` at ``when``, in seconds of ``time.monotonic``, unless the block has ended by then.

        Infinity is never. A call that has begun may end after the block.
        """
        if when == math.inf:
            yield
            return
        key = object()
        try:
            self._calls[key] = when, function
            self._thread.start()
            if when < self._wakes_at:
                self._changes.put(None)
            yield
        finally:
            self._calls.pop(key, None)

    def _watch(self) -> None:
        while True:
            self._wait()
            self._call()

    def _wait(self) -> None:
        """Wait until a call is due, or the first one may be another."""
        self._wakes_at = math.inf  # a call that is added from here on is announced
        self._wakes_at = min((when for when, _ in self._calls.copy().values()), default=math.inf)
        left = self._wakes_at - time.monotonic()
        try:
            self._changes.get(timeout=None if left == math.inf else max(0.0, left))
        except Empty:  # a call is due
            return

    def _call(self) -> None:
        now = time.monotonic()
        for key, (when, function) in self._calls.copy().items():
            if when <= now and self._calls.pop(key, None) is not None:
                function()


ALARM = AlarmThread()
os.register_at_fork(after_in_child=ALARM.__init__)  # type: ignore[misc]  # the thread is the parent's
