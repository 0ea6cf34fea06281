"""A thread of the process that starts with its first use, and never keeps the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable


class DaemonThread:
    """Runs a function in a daemon thread from the first :meth:`start`, and again after it has failed."""

    def __init__(self, name: str, serve: Callable[[], None]) -> None:
        self._name, self._serve = name, serve
        self._is_served = threading.Lock()
        """Held by the thread, so a start that Ctrl-C interrupts is neither lost nor doubled."""

    def start(self) -> None:
        """Start the thread unless it runs."""
        if not self._is_served.locked():
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        if self._is_served.acquire(blocking=False):
            try:
                self._serve()
            finally:
                self._is_served.release()
