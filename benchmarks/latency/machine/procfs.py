"""Readers of Linux's ``/proc`` and ``/sys``, and a background thread that samples at intervals."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TypeVar

ROOT = Path("/")
Self = TypeVar("Self", bound="BackgroundSampler")


def text(path: Path) -> str | None:
    """Return a file's text without white space and zeros at its ends; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\n\0")
    except OSError:
        return None


def number(path: Path) -> int | None:
    """Return a file's integer; None if it has none."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def fields(path: Path) -> dict[str, str]:
    """Return lines such as ``MemTotal:  1024 kB`` by name, the first of each; empty if the file cannot be read."""
    pairs = [line.split(":", 1) for line in (text(path) or "").splitlines() if ":" in line]
    return {name.strip(): value.strip() for name, value in reversed(pairs)}


def byte_count(written: str) -> int:
    """Return the bytes of a size such as ``1024 kB``."""
    return 1024 * int(written.removesuffix("kB"))


class BackgroundSampler(ABC):
    """Context manager that calls :meth:`sample` on entry, every ``interval`` seconds, and on exit."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._started = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @abstractmethod
    def sample(self, seconds: float) -> None:
        """Take a sample ``seconds`` after entry. Must not raise: the thread has no caller."""

    def __enter__(self: Self) -> Self:
        self._started = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._is_over.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        self.sample(time.perf_counter() - self._started)
