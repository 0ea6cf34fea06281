"""Calls at a given time, from one daemon thread of the process. The thread starts with the first call."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class AlarmThread:
    """Calls functions when their time has come."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: dict[object, tuple[float, Callable[[], None]]] = {}
        self._wakes_at = math.inf
        self._thread: threading.Thread | None = None

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
            self._wake_by(when)
            yield
        finally:
            self._calls.pop(key, None)

    def _wake_by(self, when: float) -> None:
        with self._condition:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="fusion-edge alarm", daemon=True)
                self._thread.start()
            elif when < self._wakes_at:
                self._condition.notify()

    def _watch(self) -> None:
        while True:
            self._wait()
            self._call()

    def _wait(self) -> None:
        """Wait until a call is due, or the first one may be another."""
        with self._condition:
            self._wakes_at = min((when for when, _ in list(self._calls.values())), default=math.inf)
            left = self._wakes_at - time.monotonic()
            if left > 0:
                self._condition.wait(None if left == math.inf else left)

    def _call(self) -> None:
        now = time.monotonic()
        for key, (when, function) in list(self._calls.items()):
            if when <= now and self._calls.pop(key, None) is not None:
                function()


ALARM = AlarmThread()
os.register_at_fork(after_in_child=ALARM.__init__)  # type: ignore[misc]  # the thread is the parent's
