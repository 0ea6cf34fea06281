"""Threads that end at once when the work is given up."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fusion_edge.runtime.system.progress import Progress


@contextmanager
def worker_pool(threads: int | None, progress: Progress) -> Iterator[ThreadPoolExecutor]:
    """A pool whose work tells ``progress`` of its steps.

    An error or a signal ends what runs at its next step and drops what has not begun.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            progress.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
