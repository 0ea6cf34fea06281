"""The queue of threads that ask a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from fusion_edge.runtime.backends.base import Backend, Interruptible
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.system.fair_lock import FairLock

T = TypeVar("T")


class RequestQueue:
    """Serves one thread at a time, in order of arrival, until the model is closed.

    The model has one KV cache, so a new question ends the one before it. Every question has a number, and only the
    latest number is current.
    """

    def __init__(self, backend: Backend) -> None:
        """Take ownership of ``backend``: the queue closes it once, while nothing runs."""
        self._backend = backend
        self._lock = FairLock()
        self._process = os.getpid()
        self._latest = 0
        self._is_closed = self._is_freed = False

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked process: it has the model's memory, but none of its threads."""
        return os.getpid() != self._process

    def run(self, work: Callable[[], T]) -> T:
        """Return ``work()``, called while nothing else runs. Raise :class:`FusionError` in a forked process."""
        self._check_process()
        if self._lock.is_mine:
            raise UsageError("A signal handler cannot ask the model that it interrupted; ask after its answer.")
        return self._lock.run(lambda: self._run_and_free(work))

    def _run_and_free(self, work: Callable[[], T]) -> T:
        """Return ``work()``, and free the model if a signal handler has closed it."""
        try:
            return work()
        finally:
            if self._is_closed:
                self._free_once()

    def start(self) -> int:
        """End the previous question and return the number of a new one. Raise as :meth:`check_open`."""
        self.check_open()
        self._latest += 1
        return self._latest

    def is_current(self, number: int) -> bool:
        """Return whether a question is still current: no later one was asked, and the model is open."""
        return number == self._latest and not self._is_closed

    def check_open(self) -> None:
        """Raise :class:`UsageError` once the model is closed, :class:`FusionError` in a forked process."""
        self._check_process()
        if self._is_closed:
            raise UsageError("This model has been closed; load the bundle again.")

    def close(self) -> None:
        """End the running question, wait for its end, and free the model.

        In a signal handler that interrupted the question, return at once; the question frees the model. In a forked
        process, do nothing: the model belongs to the parent.
        """
        if self.is_inherited:
            return
        was_closed, self._is_closed = self._is_closed, True
        if self._lock.is_mine:
            return
        if not was_closed and isinstance(self._backend, Interruptible):
            self._backend.interrupt()
        self._lock.run_next(self._free_once)

    def _free_once(self) -> None:
        if not self._is_freed:
            self._is_freed = True
            self._backend.close()

    def _check_process(self) -> None:
        if self.is_inherited:
            raise FusionError(
                f"This process is a fork of process {self._process}, which loaded the model; "
                "load the bundle after the fork."
            )
