"""After a question nothing holds the model but its owner, however the question ended: no cycle keeps it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes.watched_backend import SHORT, picture, watched_fusion

from fusion_edge.runtime import AnswerStream, Cancelled, Fusion, FusionError, Stopped
from fusion_edge.runtime.stages import DECODE_STEP, PREFILL


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def cancel_at(stage: str) -> Callable[[Fusion], None]:
    def ask(fusion: Fusion) -> None:
        def on_stage(name: str) -> None:
            if name == stage:
                fusion.cancel()

        with suppress(Stopped):
            fusion.answer(picture(), "What?", sampling=SHORT, on_stage=on_stage)

    return ask


def answer(fusion: Fusion) -> None:
    fusion.answer(picture(), "What?", sampling=SHORT)


def late(fusion: Fusion) -> None:
    with pytest.raises(Stopped):
        fusion.answer(picture(), "What?", sampling=SHORT, deadline=1e-9)
    fusion.answer(picture(), "What?", sampling=SHORT, deadline=30)


def stopped_stream(fusion: Fusion) -> None:
    stream = fusion.stream(picture(), "What?", sampling=SHORT)
    stream.cancel()
    for _ in range(2):
        with pytest.raises(Stopped):
            next(stream)


def wrong_question(fusion: Fusion) -> None:
    with pytest.raises(FusionError):
        fusion.answer(picture(), "why " * 600)


@pytest.mark.parametrize(
    "ask",
    [answer, late, stopped_stream, wrong_question, cancel_at(PREFILL), cancel_at(DECODE_STEP)],
    ids=["answer", "late", "stopped stream", "wrong question", "canceled", "canceled within the answer"],
)
def test_a_dropped_model_is_freed(tiny_bundle: Path, ask: Callable[[Fusion], None]) -> None:
    fusion = watched_fusion(tiny_bundle)
    ask(fusion)
    pipeline = weakref.ref(fusion.pipeline)
    del fusion
    assert pipeline() is None


def test_a_stopped_stream_is_no_cycle_that_keeps_its_picture(tiny_bundle: Path) -> None:
    fusion = watched_fusion(tiny_bundle)

    def stopped() -> weakref.ref[AnswerStream]:
        stream = fusion.stream(picture(), "What?", sampling=SHORT)
        stream.cancel()
        for _ in range(2):
            with pytest.raises(Cancelled):
                next(stream)
        return weakref.ref(stream)

    assert stopped()() is None
