"""Small files in which Linux tells of itself (``/proc``, ``/sys``), and a thread that looks from time to time."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TypeVar

ROOT = Path("/")
Self = TypeVar("Self", bound="Sampler")


def text(path: Path) -> str | None:
    """What a file holds, without white space and zeros at its ends; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\n\0")
    except OSError:
        return None


def number(path: Path) -> int | None:
    """A file's whole number; None where there is none."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def fields(path: Path) -> dict[str, str]:
    """Lines such as ``MemTotal:  1024 kB`` by their names, the first of each; empty where the file cannot be read."""
    pairs = [line.split(":", 1) for line in (text(path) or "").splitlines() if ":" in line]
    return {name.strip(): value.strip() for name, value in reversed(pairs)}


def byte_count(written: str) -> int:
    """Of a size such as ``1024 kB``."""
    return 1024 * int(written.removesuffix("kB"))


class Sampler(ABC):
    """Context manager: :meth:`sample` is called on entry, every ``interval`` seconds and on exit."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._started = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @abstractmethod
    def sample(self, seconds: float) -> None:
        """Look, ``seconds`` after entry. Must not raise: nobody would hear of it."""

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
