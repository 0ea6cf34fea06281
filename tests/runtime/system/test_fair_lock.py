"""The fair lock: Ctrl-C while a thread waits for it."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from fakes.watched_backend import interrupt_main, on_alarm

from fusion_edge.runtime.system.fair_lock import FairLock


def test_an_interrupted_wait_keeps_the_lock_exclusive() -> None:
    lock = FairLock()
    inside: list[int] = []

    def work(number: int) -> None:
        inside.append(number)
        assert len(inside) == 1
        time.sleep(0.3 if number == 0 else 0)
        inside.remove(number)

    threads = [threading.Thread(target=lock.run, args=(lambda n=number: work(n),)) for number in range(3)]
    threads[0].start()
    time.sleep(0.05)
    with on_alarm(interrupt_main):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            lock.run(lambda: work(9))
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(20)
    lock.run(lambda: work(1))
    assert inside == []
