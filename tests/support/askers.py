"""Helpers of tests that submit to an asker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from fakes.watched_backend import SHORT, BlockedCall, picture

from fusion_edge.runtime import (
    Answer,
    Asker,
    Fusion,
    Request,
)

MakeAsker = Callable[..., Asker]


@contextmanager
def busy(fusion: Fusion, asker: Asker) -> Iterator[Request[Answer]]:
    """Keep the asker's thread in the vision encoder of a request during the block."""
    call = BlockedCall(fusion, "encode")
    request = asker.submit(picture(99), "Busy?", sampling=SHORT)
    assert call.reached.wait(20)
    try:
        yield request
    finally:
        call.release()


def text(fusion: Fusion, seed: int = 0, question: str = "What?") -> str:
    return fusion.answer(picture(seed), question, sampling=SHORT).text


def done_order(requests: dict[str, Request[Answer]]) -> list[str]:
    """Names of requests in the order in which they end."""
    order: list[str] = []
    called = threading.Semaphore(0)

    def ended(name: str, _: Request[Answer]) -> None:
        order.append(name)
        called.release()

    for name, request in requests.items():
        request.add_done_callback(partial(ended, name))
    for request in requests.values():
        assert request.result(20)
        assert called.acquire(timeout=20)
    return order
