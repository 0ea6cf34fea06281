"""How many threads or tasks are in a block at once."""

from __future__ import annotations

import threading


class Concurrency:
    """A context manager that counts the threads or tasks in its blocks."""

    def __init__(self) -> None:
        self.running = self.most = 0
        """How many are in a block now, and the most that were."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.running -= 1
