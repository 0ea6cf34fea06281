"""Ctrl-C and signal handlers during a question: no deadlock and no wrong answer."""

from __future__ import annotations

import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from fakes.watched_backend import (
    CLOSED,
    ENDED,
    SHORT,
    BlockedCall,
    WatchedBackend,
    ask_until_closed,
    backend,
    interrupt_main,
    on_alarm,
    picture,
    unless_ended,
    watched_fusion,
)

from fusion_edge.runtime import Fusion, FusionError, UsageError


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    return watched_fusion(tiny_bundle)


@pytest.mark.parametrize("method", ["encode", "align", "prefill", "decode"])
def test_ctrl_c_within_a_question(fusion: Fusion, method: str) -> None:
    expected = fusion.answer(picture(), "What?", sampling=SHORT).text

    def interrupt(name: str) -> None:
        if name == method:
            backend(fusion).before = lambda name: None
            raise KeyboardInterrupt

    for ask in (partial(fusion.answer, picture(1)), fusion.conversation(picture(1)).answer):
        backend(fusion).before = interrupt
        with pytest.raises(KeyboardInterrupt):
            ask("Where?", sampling=SHORT)
        assert fusion.answer(picture(), "What?", sampling=SHORT).text == expected
        fusion.clear_image_cache()
    backend(fusion).before = interrupt
    stream = fusion.stream(picture(1), "Where?", sampling=SHORT)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    with pytest.raises(FusionError, match="This answer ended early, by an error or Ctrl-C; ask the question again"):
        next(stream)
    assert fusion.answer(picture(), "What?", sampling=SHORT).text == expected


def test_ctrl_c_at_any_moment(fusion: Fusion) -> None:
    """Ctrl-C also interrupts a thread that waits in the queue: no lock stays held, and answers stay correct."""
    expected = fusion.answer(picture(), "What?", sampling=SHORT).text
    stop = threading.Event()
    wrong = []

    def ask_on() -> None:
        while not stop.is_set():
            if fusion.answer(picture(), "What?", sampling=SHORT).text != expected:
                wrong.append("another thread's answer")

    other = threading.Thread(target=ask_on, daemon=True)
    other.start()
    with on_alarm(interrupt_main):
        for seed in range(150):
            with suppress(KeyboardInterrupt), unless_ended():
                signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-4, 8e-3))
                while True:
                    assert fusion.answer(picture(), "What?", sampling=SHORT).text == expected
                    list(fusion.conversation(picture(1)).ask("Where?", sampling=SHORT))
    stop.set()
    other.join(20)
    assert not other.is_alive()
    assert not wrong
    assert fusion.answer(picture(), "What?", sampling=SHORT).text == expected


def test_a_signal_handler_that_closes(fusion: Fusion) -> None:
    for seed in range(40):
        other = Fusion(fusion.manifest, WatchedBackend(fusion.config), fusion.tokenizer, fusion.embed)
        with on_alarm(other.close):
            signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-4, 1e-2))
            with pytest.raises(FusionError, match=f"{ENDED}|{CLOSED}"):
                ask_until_closed(other)
        assert backend(other).closed == 1


def test_a_signal_handler_that_closes_while_its_thread_waits(fusion: Fusion) -> None:
    blocked = BlockedCall(fusion, "prefill")
    with ThreadPoolExecutor(1) as pool, on_alarm(fusion.close):
        running = pool.submit(fusion.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        threading.Timer(0.2, blocked.release).start()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(UsageError, match=CLOSED):
            fusion.answer(picture(), "Where?", sampling=SHORT)
        with pytest.raises(FusionError, match=ENDED):
            running.result(20)
    assert backend(fusion).closed == 1


def test_a_signal_handler_that_asks(fusion: Fusion) -> None:
    def ask(name: str) -> None:
        if name == "prefill":
            with pytest.raises(UsageError, match="A signal handler or on_stage cannot ask the model"):
                fusion.answer(picture(), "Where?")

    backend(fusion).before = ask
    fusion.answer(picture(), "What?", sampling=SHORT)
