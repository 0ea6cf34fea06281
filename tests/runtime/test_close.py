"""``Fusion.close`` at any moment, from any thread: no deadlock, and the backend is closed once."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes.watched_backend import (
    CLOSED,
    ENDED,
    SHORT,
    BlockedCall,
    WatchedBackend,
    ask_until_closed,
    backend,
    picture,
    watched_fusion,
)

from fusion_edge.runtime import Fusion, FusionError, UsageError, load


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    return watched_fusion(tiny_bundle)


@pytest.mark.parametrize("method", ["encode", "align", "prefill", "decode"])
def test_close_ends_running_and_waiting_questions(fusion: Fusion, method: str) -> None:
    blocked = BlockedCall(fusion, method)
    with ThreadPoolExecutor(5) as pool:
        running = pool.submit(fusion.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        waiting: list[Future[Any]] = [
            pool.submit(fusion.answer, picture(), "Where?", sampling=SHORT),
            pool.submit(fusion.encode_image, picture(2)),
        ]
        time.sleep(0.05)
        closing = [pool.submit(fusion.close) for _ in range(2)]
        time.sleep(0.05)
        assert not any(close.done() for close in closing)
        blocked.release()
        with pytest.raises(FusionError, match=ENDED):
            running.result(20)
        for other in waiting:
            with pytest.raises(UsageError, match=CLOSED):
                other.result(20)
        for close in closing:
            close.result(20)
    assert backend(fusion).closed == 1
    fusion.close()
    assert backend(fusion).closed == 1
    for ask in (fusion.answer, fusion.ask, fusion.stream):
        with pytest.raises(UsageError, match=CLOSED):
            ask(picture(), "What?")
    for start in (fusion.conversation, fusion.encode_image):
        with pytest.raises(UsageError, match=CLOSED):
            start(picture())


def test_close_between_two_pieces(fusion: Fusion) -> None:
    stream = fusion.stream(picture(), "What?", sampling=SHORT)
    conversation = fusion.conversation(picture())
    next(stream)
    fusion.close()
    with pytest.raises(FusionError, match=ENDED):
        next(stream)
    assert backend(fusion).closed == 1
    with pytest.raises(UsageError, match=CLOSED):
        next(conversation.ask("What?"))


def test_close_at_any_moment(fusion: Fusion) -> None:
    for seed in range(60):
        other = Fusion(fusion.manifest, WatchedBackend(fusion.config), fusion.tokenizer, fusion.embed)
        timer = threading.Timer(random.Random(seed).uniform(0, 0.02), other.close)
        timer.start()
        with pytest.raises(FusionError, match=f"{ENDED}|{CLOSED}"):
            ask_until_closed(other)
        timer.join()
        assert backend(other).closed == 1


def test_onnx_runtime_closed_at_any_moment(tiny_bundle: Path) -> None:
    for seed in range(8):
        fusion = load(tiny_bundle, threads=1)
        timer = threading.Timer(random.Random(seed).uniform(0, 0.03), fusion.close)
        timer.start()
        with pytest.raises(FusionError, match=f"{ENDED}|{CLOSED}"):
            ask_until_closed(fusion)
        timer.join()
