"""Threads of one kind of work: waiting work is dropped, work that has begun is waited for."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref

import pytest
from support.concurrency import Concurrency

from fusion_edge.runtime.serve.workers import Workers


class Load:
    """An argument that a test can see vanish."""


def test_a_result_and_an_error() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        workers = Workers(1, "test")
        for _ in range(3):
            assert await workers.run(pow, 2, 3) == 8
            with pytest.raises(ValueError, match="no"):
                await workers.run(fail)
        assert await workers.run(lambda: threading.current_thread().name) == "test_0"
        workers.close()

    asyncio.run(main())


def test_a_cancel_waits_for_work_that_has_begun() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(20)

    async def main() -> None:
        workers = Workers(1, "test")
        task = asyncio.create_task(workers.run(work))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        for _ in range(2):  # also a second cancel
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await workers.run(pow, 2, 3) == 8
        workers.close()

    asyncio.run(main())


def test_work_that_waits_is_dropped_at_once() -> None:
    may_end = threading.Event()

    async def main() -> None:
        workers = Workers(1, "test")
        running = asyncio.create_task(workers.run(may_end.wait, 20))
        argument = Load()
        waiting = asyncio.create_task(workers.run(id, argument))
        kept = weakref.ref(argument)
        del argument
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        del waiting
        gc.collect()
        assert kept() is None  # while the thread still runs
        may_end.set()
        assert await running
        workers.close()

    asyncio.run(main())


def test_every_thread_comes_back() -> None:
    threads, moments = Concurrency(), random.Random(0)

    def work() -> None:
        with threads:
            time.sleep(0.001)

    async def main() -> None:
        workers = Workers(2, "test")
        for _ in range(30):
            tasks = [asyncio.create_task(workers.run(work)) for _ in range(8)]
            await asyncio.sleep(moments.uniform(0, 0.005))
            for task in moments.sample(tasks, 5):
                task.cancel()
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
            assert threads.running == 0
        assert threads.most == 2
        workers.close()

    asyncio.run(main())


def test_closed_workers_refuse() -> None:
    async def main() -> None:
        workers = Workers(1, "test")
        workers.close()
        for _ in range(2):  # the first one keeps no thread
            with pytest.raises(RuntimeError):
                await asyncio.wait_for(workers.run(pow, 2, 3), 20)

    asyncio.run(main())
