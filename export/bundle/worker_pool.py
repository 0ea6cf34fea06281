"""Run tasks in threads that stop soon after an error or a signal."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fusion_edge.runtime.system.progress import Progress


@contextmanager
def worker_pool(threads: int | None, progress: Progress) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool whose tasks advance ``progress``.

    After an error or a signal, running tasks stop when they next advance it, and waiting tasks are dropped.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            progress.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
