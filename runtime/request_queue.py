"""The order in which threads ask a model, and its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from fusion_edge.runtime.backends.base import Backend, Interruptible
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.system.fair_lock import FairLock

T = TypeVar("T")


class RequestQueue:
    """Lets one thread at a time compute, in the order in which they came, until the model is closed.

    There is one KV cache, so a new question gives up the one before it: every question has a number, and only the
    latest may go on.
    """

    def __init__(self, backend: Backend) -> None:
        """``backend`` is closed once, when nothing computes."""
        self._backend = backend
        self._lock = FairLock()
        self._process = os.getpid()
        self._latest = 0
        self._is_closed = self._is_freed = False

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked process, which has the model's memory but none of its threads."""
        return os.getpid() != self._process

    def run(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, called when nothing else computes. Raises :class:`FusionError` in a forked process."""
        self._check_process()
        if self._lock.is_mine:
            raise UsageError("A signal's handler asks the model that it interrupted; ask once that has answered.")
        return self._lock.run(lambda: self._attended(work))

    def _attended(self, work: Callable[[], T]) -> T:
        try:
            return work()
        finally:
            if self._is_closed:
                self._free_once()

    def begin(self) -> int:
        """Number of a new question, which gives up the one before. Raises as :meth:`check_open`."""
        self.check_open()
        self._latest += 1
        return self._latest

    def may_go_on(self, number: int) -> bool:
        """Whether a question was neither given up nor ended by a close."""
        return number == self._latest and not self._is_closed

    def check_open(self) -> None:
        """Raise :class:`UsageError` once the model is closed, :class:`FusionError` in a forked process."""
        self._check_process()
        if self._is_closed:
            raise UsageError("This model has been closed; load the bundle again.")

    def close(self) -> None:
        """End the question that is computed, wait for that, and free the model.

        From a handler that interrupted it in this thread: the question ends, and frees the model, after the handler.
        In a forked process nothing: what is there belongs to the other one.
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
                f"This model was loaded by process {self._process}, of which this one is a fork; "
                "load the bundle here, after the fork."
            )
