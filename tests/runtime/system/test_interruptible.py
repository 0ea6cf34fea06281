"""Work that Ctrl-C ends: at any moment, only after its end, and without a cycle that holds it."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import SimpleNamespace

import pytest
from fakes.watched_backend import interrupt_main, on_alarm

from fusion_edge.runtime.system import interruptible
from fusion_edge.runtime.system.interruptible import run_interruptible


class Work:
    """Runs until it is canceled. With ``interrupts`` it has :meth:`interrupt` called before and after that."""

    def __init__(self, seconds: float = 20, interrupts: bool = False) -> None:
        self.seconds, self.interrupts, self.is_running = seconds, interrupts, False
        self.signals: list[bool] = []
        """Whether the work ran, at each signal."""
        self._ends: SimpleQueue[None] = SimpleQueue()  # without a lock that Ctrl-C could leave locked
        self._handled: SimpleQueue[None] = SimpleQueue()

    def run(self) -> str:
        self.is_running = True
        self._interrupt()
        with suppress(Empty):
            self._ends.get(timeout=self.seconds)
        self._interrupt()
        self.is_running = False
        return "done"

    def _interrupt(self) -> None:
        if self.interrupts:
            os.kill(os.getpid(), signal.SIGALRM)
            self._handled.get(timeout=20)

    def interrupt(self) -> None:
        """Handle the signal as Ctrl-C."""
        self.signals.append(self.is_running)
        self._handled.put(None)
        interrupt_main()

    def fail(self) -> None:
        raise ZeroDivisionError

    def cancel(self) -> None:
        self._ends.put(None)


def test_a_result_and_an_error() -> None:
    assert run_interruptible(Work(0).run, lambda: None) == "done"
    with pytest.raises(ZeroDivisionError):
        run_interruptible(Work().fail, lambda: None)


def test_ctrl_c_cancels_and_waits() -> None:
    """Also if it comes again meanwhile."""
    work = Work(interrupts=True)
    with on_alarm(work.interrupt), pytest.raises(KeyboardInterrupt):
        run_interruptible(work.run, work.cancel)
    assert not work.is_running
    assert work.signals == [True, True]


def test_ctrl_c_at_any_moment() -> None:
    """No work runs on, and the next one runs."""
    with on_alarm(interrupt_main):
        for seed in range(400):
            work = Work(2e-5)
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-5, 2e-3))
                while True:
                    assert run_interruptible(work.run, work.cancel) == "done"
            assert not work.is_running
            assert run_interruptible(Work(0).run, lambda: None) == "done"
    assert sum(thread.name == "fusion-edge worker" for thread in threading.enumerate()) == 1


def test_ctrl_c_within_the_end_of_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the job's lock locked. The work has ended all the same."""

    class Lock:
        def __init__(self) -> None:
            self._lock, self._interrupts = threading.Lock(), True

        def acquire(self, timeout: float = -1) -> bool:
            taken = self._lock.acquire(timeout=timeout)
            if timeout > 0 and taken and self._interrupts:
                self._interrupts = False
                raise KeyboardInterrupt
            return taken

        def release(self) -> None:
            self._lock.release()

    monkeypatch.setattr(interruptible, "threading", SimpleNamespace(Lock=Lock))
    monkeypatch.setattr(interruptible, "_abandoned", [])
    work = Work(0.05)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interruptible.interruptible(work.run, work.cancel)
    assert time.monotonic() - started < interruptible.GRACE_SECONDS
    assert not interruptible.is_abandoned()


def test_nothing_holds_work_that_has_ended() -> None:
    gc.collect()
    gc.disable()
    try:
        done, failed, interrupted = Work(0), Work(), Work(interrupts=True)
        run_interruptible(done.run, done.cancel)
        with pytest.raises(ZeroDivisionError):
            run_interruptible(failed.fail, failed.cancel)
        with on_alarm(interrupted.interrupt), pytest.raises(KeyboardInterrupt):
            run_interruptible(interrupted.run, interrupted.cancel)
        held = [weakref.ref(work) for work in (done, failed, interrupted)]
        del done, failed, interrupted
        run_interruptible(lambda: None, lambda: None)  # the worker has left the work before
        assert [work() for work in held] == [None, None, None]
    finally:
        gc.enable()


def test_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(interruptible, "_WORKER", interruptible._Worker())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            run_interruptible(Work(0).run, lambda: None)
    assert run_interruptible(Work(0).run, lambda: None) == "done"
