"""A wait as in C++: no signal ends it, and no Python code runs in its thread."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

POLL_SECONDS = 0.02


class UninterruptibleWait:
    """A mutex of the C library, locked until :meth:`end`."""

    def __init__(self, polls: bool) -> None:
        """With ``polls`` a thread asks the monitor, and ends the wait when it answers no."""
        self._polls = polls
        self._library = ctypes.CDLL(None)
        self._mutex = ctypes.create_string_buffer(128)
        self._library.pthread_mutex_init(self._mutex, None)
        self._library.pthread_mutex_lock(self._mutex)
        self.began = threading.Event()

    def end(self) -> None:
        self._library.pthread_mutex_unlock(self._mutex)

    def until_refused(self, monitor: Any) -> bool:
        """Wait, and return False as a stopped build does."""
        self.began.set()
        if self._polls:
            threading.Thread(target=self._poll, args=(monitor,)).start()
        self._library.pthread_mutex_lock(self._mutex)
        return False

    def _poll(self, monitor: Any) -> None:
        while monitor.step_complete("Building", 0):
            time.sleep(POLL_SECONDS)
        self.end()
