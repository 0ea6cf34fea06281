"""Threads for work that would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """A few threads for one kind of work of one event loop, so that it delays no other kind.

    Work waits for a thread in its own task, not in a queue of the pool: once that task is cancelled, nothing keeps what
    it would have worked on. Work that has begun cannot be interrupted. It keeps its thread until its end.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = asyncio.Semaphore(threads)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function in a thread. A cancel waits for its end, so the end of a task is the end of its work."""
        await self._free.acquire()
        try:
            job = asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))
        except BaseException:  # the threads have ended
            self._free.release()
            raise
        job.add_done_callback(self._ended)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            while not job.done():
                with suppress(asyncio.CancelledError):  # again
                    await asyncio.wait([job])
            raise
        finally:
            del job  # an error's traceback would keep it, and all that the work had

    def close(self) -> None:
        """Let the threads end after their work."""
        self._threads.shutdown(wait=False)

    def _ended(self, job: asyncio.Future[T]) -> None:
        self._free.release()
        if not job.cancelled():
            job.exception()  # seen, also if nobody waits any more
