"""A backend that fails on concurrent calls, and helpers that ask it from threads and signal handlers."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from fakes.fake_backend import FakeBackend
from tokenizers import Tokenizer

from fusion_edge.runtime import Fusion, FusionError, Sampling
from fusion_edge.runtime.backends.base import Floats, KvPrefix
from fusion_edge.runtime.bundle.manifest import TOKENIZER
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.tokenization.embeddings import Embeddings

SHORT = Sampling(max_new_tokens=6)
QUESTIONS = ("What is it?", "Where?", "Which one?", "Why?")
T = TypeVar("T")
ENDED = "ended because another question was asked|The model was closed"
CLOSED = "has been closed; load the bundle again"


class WatchedBackend(FakeBackend):
    """Fails on concurrent calls and on calls after close. Runs ``before`` before every call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.before: Callable[[str], object] = lambda name: None
        self.closed = 0
        self._busy = threading.Lock()

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        assert self._busy.acquire(blocking=False), "two threads at once"
        try:
            assert not self.closed
            self.before(name)
            yield
        finally:
            self._busy.release()

    def encode(self, *arguments: Any) -> Floats:
        with self._exclusive("encode"):
            return super().encode(*arguments)

    def align(self, *arguments: Any) -> Any:
        with self._exclusive("align"):
            return super().align(*arguments)

    def prefill(self, *arguments: Any) -> Floats:
        with self._exclusive("prefill"):
            return super().prefill(*arguments)

    def decode(self, embedding: Floats) -> Floats:
        with self._exclusive("decode"):
            return super().decode(embedding)

    def prefill_prefix(self, embeddings: Floats) -> KvPrefix:
        with self._exclusive("prefill_prefix"):
            return super().prefill_prefix(embeddings)

    def rewind(self, length: int) -> None:
        with self._exclusive("rewind"):
            super().rewind(length)

    def close(self) -> None:
        with self._exclusive("close"):
            self.closed += 1


def watched_fusion(folder: Path) -> Fusion:
    """Return the model of a bundle on a :class:`WatchedBackend`."""
    bundle = open_bundle(folder)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    return Fusion(bundle.manifest, WatchedBackend(bundle.manifest.model), tokenizer, Embeddings(bundle))


def backend(fusion: Fusion) -> WatchedBackend:
    assert isinstance(fusion.backend, WatchedBackend)
    return fusion.backend


def wait_for_arrival(fusion: Fusion, start: Callable[[], T]) -> T:
    """Call ``start``, and return its value once a thread that it started has a place in the model's queue."""
    lock = fusion.queue._lock
    before = lock._last
    started, due = start(), time.monotonic() + 20
    while lock._last is before:
        assert time.monotonic() < due, "no thread has arrived"
        time.sleep(0.001)
    return started


class BlockedCall:
    """Blocks the first call of a backend's method until :meth:`release`."""

    def __init__(self, fusion: Fusion, method: str) -> None:
        self.reached, self._released = threading.Event(), threading.Event()
        self._method, self._backend = method, backend(fusion)
        self._backend.before = self._before

    def _before(self, name: str) -> None:
        if name == self._method and not self.reached.is_set():
            self.reached.set()
            assert self._released.wait(20)

    def release(self) -> None:
        self._released.set()


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)


def in_threads(count: int, work: Callable[[int], object]) -> list[Any]:
    """Return the results of ``work(0)`` to ``work(count - 1)``, each from its own thread."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@contextmanager
def unless_ended() -> Iterator[None]:
    """Ignore the error of a stream that another question or a close has ended."""
    try:
        yield
    except FusionError as error:
        if not re.search(ENDED, str(error)):
            raise


def ask_until_closed(fusion: Fusion) -> NoReturn:
    """Ask until an error ends the loop."""
    while True:
        list(fusion.ask(picture(), "What?", sampling=SHORT))
        fusion.answer(picture(1), "Where?", sampling=SHORT)


@contextmanager
def on_alarm(handler: Callable[[], object]) -> Iterator[None]:
    """Handle ``SIGALRM``, and stop its timer after the block."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt_main() -> NoReturn:
    raise KeyboardInterrupt
