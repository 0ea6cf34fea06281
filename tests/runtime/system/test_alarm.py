"""Calls at a given time, from one thread that nothing ends for good."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from contextlib import suppress

import pytest
from fakes.watched_backend import interrupt_main, on_alarm

from fusion_edge.runtime.system.alarm import AlarmThread


def test_calls_in_order_of_their_time() -> None:
    alarm, called = AlarmThread(), []
    done = threading.Event()
    now = time.monotonic()
    with (
        alarm.calling(now + 0.2, done.set),
        alarm.calling(now + 0.1, lambda: called.append(2)),
        alarm.calling(now - 1, lambda: called.append(1)),
        alarm.calling(now + 60, lambda: called.append(3)),
        alarm.calling(math.inf, lambda: called.append(4)),
    ):
        assert done.wait(20)
    assert called == [1, 2]
    assert not alarm._calls


def test_a_block_that_ends_earlier() -> None:
    alarm, called = AlarmThread(), []
    done = threading.Event()
    due = time.monotonic() + 0.05
    with alarm.calling(due, lambda: called.append(1)):
        pass
    with alarm.calling(due + 0.05, done.set):
        assert done.wait(20)
    assert called == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_fails() -> None:
    """It ends the thread, and the next call starts another."""
    alarm, failed, done = AlarmThread(), threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise ZeroDivisionError

    with alarm.calling(time.monotonic(), fail):
        assert failed.wait(20)
    due = time.monotonic() + 20
    while not done.is_set():
        assert time.monotonic() < due
        with alarm.calling(time.monotonic(), done.set):
            done.wait(0.05)


def test_ctrl_c_at_any_moment() -> None:
    """Later calls come, and entries do not stay."""
    alarm = AlarmThread()
    with on_alarm(interrupt_main):
        for seed in range(300):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-5, 1e-3))
                while True:
                    with alarm.calling(time.monotonic() + 5, lambda: None):
                        pass
    done = threading.Event()
    with alarm.calling(time.monotonic() + 0.01, done.set):
        assert done.wait(20)
