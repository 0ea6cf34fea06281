"""Threads and signals on one ``Fusion``: no wrong text and no deadlock."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from fakes.fake_backend import FakeBackend
from tokenizers import Tokenizer

from fusion_edge.runtime import Fusion, FusionError, Sampling, UsageError, load
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.bundle.manifest import TOKENIZER
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.system.fair_lock import FairLock
from fusion_edge.runtime.tokenization.embeddings import Embeddings

SHORT = Sampling(max_new_tokens=6)
QUESTIONS = ("What is it?", "Where?", "How many shapes are there?", "Why?")
ENDED = "ended because another question was asked or the model was closed"
CLOSED = "has been closed; load the bundle again"


class WatchedBackend(FakeBackend):
    """Fails on concurrent calls and on calls after close. Runs ``before`` before every call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.before: Callable[[str], object] = lambda name: None
        self.closed = 0
        self._busy = threading.Lock()

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        assert self._busy.acquire(blocking=False), "two threads at once"
        try:
            assert not self.closed
            self.before(name)
            yield
        finally:
            self._busy.release()

    def encode(self, *arguments: Any) -> Floats:
        with self._alone("encode"):
            return super().encode(*arguments)

    def align(self, *arguments: Any) -> Any:
        with self._alone("align"):
            return super().align(*arguments)

    def prefill(self, *arguments: Any) -> Floats:
        with self._alone("prefill"):
            return super().prefill(*arguments)

    def decode(self, embedding: Floats) -> Floats:
        with self._alone("decode"):
            return super().decode(embedding)

    def close(self) -> None:
        with self._alone("close"):
            self.closed += 1


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    bundle = open_bundle(tiny_bundle)
    tokenizer = Tokenizer.from_file(str(tiny_bundle / TOKENIZER))
    return Fusion(bundle.manifest, WatchedBackend(bundle.manifest.model), tokenizer, Embeddings(bundle))


def backend(fusion: Fusion) -> WatchedBackend:
    assert isinstance(fusion.backend, WatchedBackend)
    return fusion.backend


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)


def in_threads(count: int, work: Callable[[int], object]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@contextmanager
def unless_ended() -> Iterator[None]:
    try:
        yield
    except FusionError as error:
        if ENDED not in str(error):
            raise


def ask_until_closed(fusion: Fusion) -> NoReturn:
    while True:
        list(fusion.ask(picture(), "What?", sampling=SHORT))
        fusion.answer(picture(1), "Where?", sampling=SHORT)


class Held:
    """Blocks the first call of a backend's method until it is released."""

    def __init__(self, fusion: Fusion, method: str) -> None:
        self.reached, self._go = threading.Event(), threading.Event()
        self._method, self._backend = method, backend(fusion)
        self._backend.before = self._before

    def _before(self, name: str) -> None:
        if name == self._method and not self.reached.is_set():
            self.reached.set()
            assert self._go.wait(20)

    def let_go(self) -> None:
        self._go.set()


# Questions --------------------------------------------------------------------------------------------------


def test_whole_answers_wait_for_each_other(fusion: Fusion) -> None:
    cases = [(picture(seed % 3), QUESTIONS[seed % 4]) for seed in range(12)]
    expected = [fusion.answer(image, question, sampling=SHORT).text for image, question in cases]
    backend(fusion).before = lambda name: time.sleep(random.random() / 1000)

    def ask(number: int) -> None:
        for turn in range(number, number + 6):
            image, question = cases[turn % 12]
            assert fusion.answer(image, question, sampling=SHORT).text == expected[turn % 12]

    in_threads(5, ask)


def test_streams_are_right_or_ended(fusion: Fusion) -> None:
    expected = [fusion.answer(picture(), question, sampling=SHORT).text for question in QUESTIONS]
    outcomes: list[str] = []

    def ask(number: int) -> None:
        for turn in range(number, number + 20):
            text = ""
            outcomes.append("ended")
            with unless_ended():
                for piece in fusion.ask(picture(), QUESTIONS[turn % 4], sampling=SHORT):
                    text += piece
                    time.sleep(random.random() / 2000)
                assert text.strip() == expected[turn % 4]
                outcomes.remove("ended")
            if turn % 5 == 0:
                assert fusion.answer(picture(), QUESTIONS[turn % 4], sampling=SHORT).text == expected[turn % 4]

    in_threads(3, ask)
    assert outcomes
    assert "".join(fusion.ask(picture(), QUESTIONS[0], sampling=SHORT)).strip() == expected[0]


def take_all(pieces: Iterator[str], number: int) -> list[str]:
    return list(pieces)


def test_one_stream_in_two_threads(fusion: Fusion) -> None:
    expected = fusion.answer(picture(), "What?", sampling=Sampling(max_new_tokens=60))
    pieces = list(fusion.ask(picture(), "What?", sampling=Sampling(max_new_tokens=60)))
    stream = fusion.stream(picture(), "What?", sampling=Sampling(max_new_tokens=60))
    conversation = fusion.conversation(picture())
    for asked in (stream, conversation.ask("What?", sampling=Sampling(max_new_tokens=60))):
        taken = in_threads(3, partial(take_all, asked))
        assert sorted(chain.from_iterable(taken)) == sorted(pieces)
        assert list(asked) == []
    assert stream.answer.token_ids == expected.token_ids
    assert [turn.answer for turn in conversation.history] == [expected.text]


def test_a_stream_that_nobody_advances_holds_nobody_up(fusion: Fusion) -> None:
    stream = fusion.stream(picture(), "What?", sampling=SHORT)
    next(stream)
    in_threads(2, lambda _: fusion.answer(picture(), "Where?", sampling=SHORT))
    with pytest.raises(FusionError, match=ENDED):
        next(stream)
    for _ in range(20):
        next(fusion.ask(picture(), "What?", sampling=SHORT))
    gc.collect()
    fusion.answer(picture(), "Where?", sampling=SHORT)


def test_questions_are_answered_in_the_order_in_which_they_came(fusion: Fusion) -> None:
    held = Held(fusion, "prefill")
    order: list[int] = []

    def ask(number: int) -> None:
        fusion.answer(picture(), QUESTIONS[number % 4], sampling=SHORT)
        order.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
        assert held.reached.wait(20)
        time.sleep(0.02)
    held.let_go()
    for thread in threads:
        thread.join(20)
    assert order == list(range(8))


def test_conversations_in_several_threads(fusion: Fusion) -> None:
    conversation = fusion.conversation(picture())
    one = Sampling(max_new_tokens=2)

    def ask(number: int) -> None:
        conversation.answer(f"{QUESTIONS[number]}", sampling=one)
        with unless_ended():
            list(conversation.ask("And?", sampling=one))

    in_threads(4, ask)
    history = list(conversation.history)
    assert {turn.question for turn in history} >= set(QUESTIONS)
    for number, turn in enumerate(history):
        answer = fusion.answer(picture(), turn.question, history=history[:number], sampling=one)
        assert answer.text == turn.answer


def test_a_conversation_asks_when_the_first_piece_is_taken(fusion: Fusion) -> None:
    conversation = fusion.conversation(picture())
    first, second = (conversation.ask(question, sampling=SHORT) for question in QUESTIONS[:2])
    list(chain(first, second))
    assert [turn.question for turn in conversation.history] == list(QUESTIONS[:2])


# Closing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["encode", "align", "prefill", "decode"])
def test_close_ends_what_another_thread_waits_for(fusion: Fusion, method: str) -> None:
    held = Held(fusion, method)
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(fusion.answer, picture(), "What?", sampling=SHORT)
        assert held.reached.wait(20)
        waiting = pool.submit(fusion.answer, picture(), "Where?", sampling=SHORT)
        time.sleep(0.05)
        closing = [pool.submit(fusion.close) for _ in range(2)]
        time.sleep(0.05)
        assert not any(close.done() for close in closing)
        held.let_go()
        with pytest.raises(FusionError, match=ENDED):
            running.result(20)
        with pytest.raises(UsageError, match=CLOSED):
            waiting.result(20)
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


def test_onnx_runtime_ends_early(tiny_bundle: Path) -> None:
    """All later runs fail, and a close still frees the memory."""
    with load(tiny_bundle, threads=1) as fusion:
        fusion.backend.interrupt()  # type: ignore[attr-defined]
        with pytest.raises(FusionError, match=r"ONNX Runtime failed while running vision_encoder: .*terminate"):
            fusion.answer(picture(), "What?", sampling=SHORT)
    fusion.backend.interrupt()  # type: ignore[attr-defined]


def test_onnx_runtime_closed_at_any_moment(tiny_bundle: Path) -> None:
    for seed in range(8):
        fusion = load(tiny_bundle, threads=1)
        timer = threading.Timer(random.Random(seed).uniform(0, 0.03), fusion.close)
        timer.start()
        with pytest.raises(FusionError, match=f"{ENDED}|{CLOSED}"):
            ask_until_closed(fusion)
        timer.join()


# Signals ----------------------------------------------------------------------------------------------------


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


@contextmanager
def on_alarm(handler: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt_main() -> NoReturn:
    raise KeyboardInterrupt


def test_ctrl_c_at_any_moment(fusion: Fusion) -> None:
    """Also while a thread waits in the queue: no lock stays held, and answers stay right."""
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


def test_a_handler_that_closes(fusion: Fusion) -> None:
    for seed in range(40):
        other = Fusion(fusion.manifest, WatchedBackend(fusion.config), fusion.tokenizer, fusion.embed)
        with on_alarm(other.close):
            signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-4, 1e-2))
            with pytest.raises(FusionError, match=f"{ENDED}|{CLOSED}"):
                ask_until_closed(other)
        assert backend(other).closed == 1


def test_a_handler_that_closes_while_its_thread_waits(fusion: Fusion) -> None:
    held = Held(fusion, "prefill")
    with ThreadPoolExecutor(1) as pool, on_alarm(fusion.close):
        running = pool.submit(fusion.answer, picture(), "What?", sampling=SHORT)
        assert held.reached.wait(20)
        threading.Timer(0.2, held.let_go).start()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(UsageError, match=CLOSED):
            fusion.answer(picture(), "Where?", sampling=SHORT)
        with pytest.raises(FusionError, match=ENDED):
            running.result(20)
    assert backend(fusion).closed == 1


def test_a_handler_that_asks(fusion: Fusion) -> None:
    def ask(name: str) -> None:
        if name == "prefill":
            with pytest.raises(UsageError, match="A signal handler cannot ask the model that it interrupted"):
                fusion.answer(picture(), "Where?")

    backend(fusion).before = ask
    fusion.answer(picture(), "What?", sampling=SHORT)


def test_an_interrupted_wait_lets_nobody_in() -> None:
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
