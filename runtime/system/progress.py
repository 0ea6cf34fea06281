"""A progress line on standard error with share, rate and time left; nothing if that is not a terminal."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from types import TracebackType

from fusion_edge.runtime.system.status_line import StatusLine

REFRESH_SECONDS = 0.2


class Progress:
    """Shows progress in a ``with`` block. Several threads may call :meth:`advance`."""

    def __init__(self, label: str, total: int, unit: str | None = "MB") -> None:
        """Count up to ``total``. ``unit`` names a million of them, for the rate; None shows no rate."""
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self._start = time.monotonic()
        self._shown = self._start  # shorter work shows nothing
        self._is_canceled = False
        self._lock = threading.Lock()
        self._line = StatusLine()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.show("")

    def extend(self, count: int) -> None:
        """Add ``count`` to the total."""
        with self._lock:
            self.total += count

    def cancel(self) -> None:
        """Make :meth:`advance` raise ``CancelledError`` from now on, in any thread."""
        self._is_canceled = True

    def advance(self, count: int) -> None:
        """Add ``count`` to the work done."""
        if self._is_canceled:
            raise CancelledError
        with self._lock:
            self.done += count
            now = time.monotonic()
            if not self._line.is_terminal or now - self._shown < REFRESH_SECONDS:
                return
            self._shown = now
            elapsed = now - self._start
            left = elapsed * (self.total - self.done) / max(self.done, 1)
            share, rate = self.done / max(self.total, 1), self.done / 1e6 / elapsed
            speed = "" if self.unit is None else f" {rate:.0f} {self.unit}/s,"
            self._line.show(f"{self.label}: {share:4.0%},{speed} {left:.0f} s left")
