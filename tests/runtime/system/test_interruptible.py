"""Work that Ctrl-C ends: at any moment, only after its end, and without a cycle that holds it."""

from __future__ import annotations

import gc
import random
import signal
import threading
import weakref
from contextlib import suppress

import pytest
from fakes.watched_backend import interrupt_main, on_alarm

from fusion_edge.runtime.system.interruptible import run_interruptible


class Work:
    """Runs until it is canceled, and a little longer."""

    def __init__(self, seconds: float = 20, rest: float = 0) -> None:
        self.seconds, self.rest, self.is_running = seconds, rest, False
        self._end = threading.Event()

    def run(self) -> str:
        self.is_running = True
        self._end.wait(self.seconds)
        time.sleep(self.rest)
        self.is_running = False
        return "done"

    def fail(self) -> None:
        raise ZeroDivisionError

    def cancel(self) -> None:
        self._end.set()


def test_a_result_and_an_error() -> None:
    assert run_interruptible(Work(0).run, lambda: None) == "done"
    with pytest.raises(ZeroDivisionError):
        run_interruptible(Work().fail, lambda: None)


def test_ctrl_c_cancels_and_waits() -> None:
    """Also if it comes again meanwhile."""
    work, signals = Work(rest=0.2), []

    def interrupt() -> None:
        signals.append(work.is_running)
        interrupt_main()

    with on_alarm(interrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.15)
        with pytest.raises(KeyboardInterrupt):
            run_interruptible(work.run, work.cancel)
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert not work.is_running
    assert signals == [True, True]


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


def test_nothing_holds_work_that_has_ended() -> None:
    gc.collect()
    gc.disable()
    try:
        done, failed, interrupted = Work(0), Work(), Work()
        run_interruptible(done.run, done.cancel)
        with pytest.raises(ZeroDivisionError):
            run_interruptible(failed.fail, failed.cancel)
        with on_alarm(interrupt_main), pytest.raises(KeyboardInterrupt):  # noqa: PT012
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            run_interruptible(interrupted.run, interrupted.cancel)
        held = [weakref.ref(work) for work in (done, failed, interrupted)]
        del done, failed, interrupted
        run_interruptible(lambda: None, lambda: None)  # the worker has left the work before
        assert [work() for work in held] == [None, None, None]
    finally:
        gc.enable()


def test_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_edge.runtime.system import interruptible

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(interruptible, "_WORKER", interruptible._Worker())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            run_interruptible(Work(0).run, lambda: None)
    assert run_interruptible(Work(0).run, lambda: None) == "done"
