"""The queue of threads that ask a model."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from fusion_edge.runtime.arguments import check_timeout
from fusion_edge.runtime.backends.base import Backend, Interruptible
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.run_control import RunControl, StopReason, StopSignal
from fusion_edge.runtime.system.alarm import ALARM
from fusion_edge.runtime.system.fair_lock import FairLock

T = TypeVar("T")


class RequestQueue:
    """Serves one thread at a time, in order of arrival, until the model is closed.

    The model has one KV cache, so a new question ends the one before it. Only the latest question is current.
    """

    def __init__(self, backend: Backend, free: Callable[[], None]) -> None:
        """``free`` closes the backend. The queue calls it once, while nothing runs."""
        self._backend = backend
        self._free = [free]
        self._lock = FairLock()
        self._guard = threading.RLock()
        """Held while ``_running`` changes, so an interrupt never reaches the run of another question."""
        self._process = os.getpid()
        self._running: RunControl | None = None
        self._current: Callable[[], RunControl | None] = lambda: None
        """Weak: a question that nobody can continue is gone, with what its ``on_stage`` holds."""
        self._is_closed = self._is_freed = False

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked process: it has the model's memory, but none of its threads."""
        return os.getpid() != self._process

    def run(self, work: Callable[[], T], control: RunControl) -> T:
        """Return ``work()``, called while nothing else runs.

        Raises :class:`Stopped` if ``control`` stops the question while it waits or outside of an answer,
        :class:`FusionError` in a forked process.
        """
        self._check_process()
        if self._lock.is_mine:
            raise UsageError(
                "A signal handler or on_stage cannot ask the model that it interrupted; ask after the answer."
            )
        try:
            return self._lock.run(lambda: self._serve(work, control), control.check, control.due)
        except StopSignal:
            raise control.error() from None

    def _serve(self, work: Callable[[], T], control: RunControl) -> T:
        """Return ``work()``, and free the model if it was closed meanwhile."""
        try:
            with self._interruptible(control), ALARM.calling(control.due, lambda: self.stop(control, "deadline")):
                return work()
        finally:
            if self._is_closed:
                self._free_once()

    @contextmanager
    def _interruptible(self, control: RunControl) -> Iterator[None]:
        """Let :meth:`stop` interrupt the backend while ``control``'s question runs."""
        try:
            with self._guard:
                self._running = control
                if isinstance(self._backend, Interruptible):
                    self._backend.resume()
            yield
        finally:
            if self._running is control:  # after Ctrl-C this may be late
                self._running = None

    def stop(self, control: RunControl, reason: StopReason) -> None:
        """Stop a question, within a graph if it runs. Do nothing in a forked process."""
        if self.is_inherited:
            return
        with self._guard:
            control.stop(reason)
            if self._running is control and isinstance(self._backend, Interruptible):
                self._backend.interrupt()

    def stop_all(self, reason: StopReason) -> None:
        """Stop what runs, and the current question, which may have pieces left."""
        for control in (self._running, self._current()):
            if control is not None:
                self.stop(control, reason)

    def start(self, control: RunControl) -> None:
        """Make a question the current one, which ends the one before. Raise as :meth:`check_open`.

        A question that has to stop leaves the one before as it is.
        """
        self.check_open()
        control.check()
        self._current = weakref.ref(control)

    def is_current(self, control: RunControl) -> bool:
        """Return whether no later question was asked."""
        return self._current() is control

    def when_freed(self, free: Callable[[], None]) -> None:
        """Call ``free`` after the model has been freed."""
        self._free.append(free)

    def check_open(self) -> None:
        """Raise :class:`UsageError` once the model is closed, :class:`FusionError` in a forked process."""
        self._check_process()
        if self._is_closed:
            raise UsageError("This model has been closed; load the bundle again.")

    def close(self, timeout: float | None) -> None:
        """Stop the running question, wait for its end at most ``timeout`` seconds, and free the model.

        In a signal handler that interrupted the question, return at once; the question frees the model. In a forked
        process, do nothing: the model belongs to the parent.

        Raises :class:`UsageError` for an invalid ``timeout``, and :class:`FusionError` if the wait ends by it; the
        question then frees the model.
        """
        timeout = check_timeout(timeout)
        if self.is_inherited:
            return
        self._is_closed = True
        self.stop_all("closed")
        if self._lock.is_mine:
            return
        try:
            self._lock.run_next(self._free_once, timeout)
        except TimeoutError:
            raise FusionError(
                f"A question still runs after {timeout:g} s; the model is closed, and frees its memory when it ends."
            ) from None

    def _free_once(self) -> None:
        if not self._is_freed:
            self._is_freed = True
            with ExitStack() as stack:  # an error of one keeps none from the others
                for free in reversed(self._free):
                    stack.callback(free)

    def _check_process(self) -> None:
        if self.is_inherited:
            raise FusionError(
                f"This process is a fork of process {self._process}, which loaded the model; "
                "load the bundle after the fork."
            )
