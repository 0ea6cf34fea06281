"""A thread that looks at something from time to time while other work goes on."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

Self = TypeVar("Self", bound="Sampler")


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
