"""Cancel and deadline: a question ends at any moment, with what was reached, and the next answer is right."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.watched_backend import (
    ENDED,
    QUESTIONS,
    SHORT,
    BlockedCall,
    WatchedBackend,
    backend,
    picture,
    wait_for_arrival,
    watched_fusion,
)

from fusion_edge.runtime import (
    Answer,
    Cancelled,
    DeadlineExceeded,
    Fusion,
    FusionError,
    Sampling,
    Stopped,
    UsageError,
    load,
)
from fusion_edge.runtime.stages import ALIGNMENT, DECODE_STEP, ENCODE_GLOBAL, ENCODE_LOCAL, PREFILL, PREPROCESS, WAITING

STAGES = {"encode": ENCODE_GLOBAL, "align": ALIGNMENT, "prefill": PREFILL, "decode": DECODE_STEP}


class InterruptibleBackend(WatchedBackend):
    """Ends a call of ``blocked`` with an error when it is interrupted, as ONNX Runtime does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.blocked = ""
        self.reached, self._interrupted = threading.Event(), threading.Event()
        self.before = self._block

    def _block(self, name: str) -> None:
        if name == self.blocked:
            self.reached.set()
            assert self._interrupted.wait(20), "not interrupted"
        if self._interrupted.is_set() and name != "close":
            raise FusionError("terminated")

    def interrupt(self) -> None:
        self._interrupted.set()

    def resume(self) -> None:
        self._interrupted.clear()


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    return watched_fusion(tiny_bundle)


@pytest.fixture
def stoppable(fusion: Fusion) -> Fusion:
    return Fusion(fusion.manifest, InterruptibleBackend(fusion.config), fusion.tokenizer, fusion.embed)


def block(fusion: Fusion, method: str) -> InterruptibleBackend:
    assert isinstance(fusion.backend, InterruptibleBackend)
    fusion.backend.blocked = method
    fusion.backend.reached.clear()
    return fusion.backend


@pytest.mark.parametrize("method", ["encode", "align", "prefill"])
def test_a_cancel_before_the_answer_begins(stoppable: Fusion, method: str) -> None:
    expected = stoppable.answer(picture(), "What?", sampling=SHORT)
    stoppable.clear_image_cache()
    blocked = block(stoppable, method)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stoppable.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        stoppable.cancel()
        with pytest.raises(Cancelled, match=f"The question was cancelled in stage '{STAGES[method]}'") as caught:
            running.result(20)
    assert caught.value.stage == STAGES[method]
    partial = caught.value.partial
    assert (partial.text, partial.token_ids, partial.finish_reason) == ("", (), "cancelled")
    assert partial.timings_ms["preprocess"] > 0
    assert partial.timings_ms["decode"] == 0
    blocked.blocked = ""
    assert stoppable.answer(picture(), "What?", sampling=SHORT).token_ids == expected.token_ids


def test_a_cancel_within_the_answer(stoppable: Fusion) -> None:
    expected = stoppable.answer(picture(), "What?", sampling=SHORT)
    blocked = block(stoppable, "decode")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stoppable.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        stoppable.cancel()
        answer = running.result(20)
    assert (answer.finish_reason, answer.is_complete) == ("cancelled", False)
    assert answer.token_ids == expected.token_ids[:1]
    assert expected.text.startswith(answer.text)
    assert answer.prompt_tokens == expected.prompt_tokens


def test_what_was_computed_for_the_image_stays_cached(stoppable: Fusion) -> None:
    blocked = block(stoppable, "prefill")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stoppable.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        stoppable.cancel()
        assert isinstance(running.exception(20), Cancelled)
    blocked.blocked = ""
    blocked.calls.clear()
    stoppable.answer(picture(), "What?", sampling=SHORT)
    assert [name for name, _ in blocked.calls[:2]] == ["encode", "prefill"]  # the local crop only


def test_a_stream_is_canceled_between_two_pieces(fusion: Fusion) -> None:
    pieces = list(fusion.stream(picture(), "What?", sampling=Sampling(max_new_tokens=40)))
    stream = fusion.stream(picture(), "What?", sampling=Sampling(max_new_tokens=40))
    first = next(stream)
    stream.cancel()
    rest = list(stream)
    answer = stream.answer
    assert answer.finish_reason == "cancelled"
    assert "".join(pieces).startswith(first + "".join(rest))
    assert (first + "".join(rest)).strip() == answer.text
    stream.cancel()  # of a stream that has ended
    assert list(stream) == []
    assert stream.answer is answer


def test_a_cancel_stops_only_what_runs(stoppable: Fusion) -> None:
    expected = stoppable.answer(picture(), "Where?", sampling=SHORT)
    blocked = block(stoppable, "prefill")
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(stoppable.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        waiting = pool.submit(stoppable.answer, picture(), "Where?", sampling=SHORT)
        blocked.blocked = ""
        stoppable.cancel()
        assert isinstance(running.exception(20), Cancelled)
        assert waiting.result(20).token_ids == expected.token_ids
    stoppable.cancel()  # nothing runs
    assert stoppable.answer(picture(), "Where?", sampling=SHORT).finish_reason == expected.finish_reason


def test_encode_image_is_canceled(stoppable: Fusion) -> None:
    blocked = block(stoppable, "encode")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stoppable.encode_image, picture())
        assert blocked.reached.wait(20)
        stoppable.cancel()
        with pytest.raises(Cancelled, match="encode global crops"):
            running.result(20)


# Deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["encode", "align", "prefill"])
def test_a_deadline_before_the_answer_begins(stoppable: Fusion, method: str) -> None:
    block(stoppable, method)
    started = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match=r"The deadline of 1.5 s passed in stage '.*'; allow more time"
    ) as caught:
        stoppable.answer(picture(), "What?", sampling=SHORT, deadline=1.5)
    assert 1.5 <= time.monotonic() - started < 15
    assert caught.value.stage == STAGES[method]
    assert caught.value.partial.finish_reason == "deadline"


def test_a_deadline_within_the_answer(stoppable: Fusion) -> None:
    expected = stoppable.answer(picture(), "What?", sampling=SHORT)
    block(stoppable, "decode")
    for answer in (
        stoppable.answer(picture(), "What?", sampling=SHORT, deadline=1.5),
        stoppable.conversation(picture()).answer("What?", sampling=SHORT, deadline=1.5),
    ):
        assert answer.finish_reason == "deadline"
        assert answer.token_ids == expected.token_ids[:1]
    block(stoppable, "")
    assert stoppable.answer(picture(), "What?", sampling=SHORT, deadline=60).token_ids == expected.token_ids


def test_an_answer_cut_short_is_not_in_the_history(stoppable: Fusion) -> None:
    conversation = stoppable.conversation(picture())
    block(stoppable, "decode")
    stream = conversation.stream("What?", sampling=SHORT, deadline=1.5)
    list(stream)
    assert stream.answer.finish_reason == "deadline"
    assert conversation.history == []
    block(stoppable, "")
    conversation.answer("What?", sampling=SHORT)
    assert [turn.question for turn in conversation.history] == ["What?"]


def test_a_deadline_passes_between_two_pieces(fusion: Fusion) -> None:
    stream = fusion.stream(picture(), "What?", sampling=Sampling(max_new_tokens=40), deadline=2)
    next(stream)
    time.sleep(2.05)
    list(stream)
    assert stream.answer.finish_reason == "deadline"
    assert 1 <= len(stream.answer.token_ids) < 40


def test_a_deadline_passes_while_a_question_waits(fusion: Fusion) -> None:
    """The turns of the others stay in order."""
    blocked = BlockedCall(fusion, "prefill")
    order: list[int] = []

    def ask(number: int) -> None:
        fusion.answer(picture(), QUESTIONS[number], sampling=SHORT)
        order.append(number)

    with ThreadPoolExecutor(4) as pool:
        futures: list[Future[Any]] = [pool.submit(ask, 0)]
        assert blocked.reached.wait(20)
        late = wait_for_arrival(
            fusion, lambda: pool.submit(fusion.answer, picture(), "Why?", sampling=SHORT, deadline=1)
        )
        futures += [wait_for_arrival(fusion, partial(pool.submit, ask, number)) for number in (1, 2)]
        with pytest.raises(DeadlineExceeded, match="passed before the first stage") as caught:
            late.result(20)
        assert caught.value.stage == WAITING
        assert order == []
        blocked.release()
        for future in futures:
            future.result(20)
    assert order == [0, 1, 2]


@pytest.mark.parametrize("deadline", [0, -1, math.nan, math.inf, "1", True])
def test_invalid_deadlines(fusion: Fusion, deadline: Any) -> None:
    conversation = fusion.conversation(picture())
    asks: list[Callable[..., object]] = [
        *(lambda *_, ask=ask, **options: ask(picture(), "What?", **options) for ask in (fusion.ask, fusion.answer)),
        *(lambda *_, ask=ask, **options: ask("What?", **options) for ask in (conversation.ask, conversation.answer)),
    ]
    for ask in asks:
        with pytest.raises(UsageError, match=r"deadline is .*; expected a number of seconds above 0, or None"):
            ask(deadline=deadline)
    assert backend(fusion).calls == []


def test_a_deadline_of_a_million_years(fusion: Fusion) -> None:
    assert fusion.answer(picture(), "What?", sampling=SHORT, deadline=3e13).is_complete


# Stages ------------------------------------------------------------------------------------------------------------


def test_stages_are_told_as_they_begin(fusion: Fusion) -> None:
    before = [PREPROCESS, ENCODE_GLOBAL, ENCODE_LOCAL, ALIGNMENT, PREFILL]
    for _ in range(2):
        stages: list[str] = []
        fusion.answer(picture(), "What?", sampling=SHORT, on_stage=stages.append)
        assert stages == [*before, DECODE_STEP]
    stages = []
    fusion.answer(picture(), "What?", sampling=Sampling(max_new_tokens=1), on_stage=stages.append)
    assert stages == before


def test_an_error_of_on_stage_ends_the_question_alone(fusion: Fusion) -> None:
    def fail(stage: str) -> None:
        if stage == PREFILL:
            raise ZeroDivisionError

    expected = fusion.answer(picture(), "What?", sampling=SHORT)
    with pytest.raises(ZeroDivisionError):
        fusion.answer(picture(), "What?", sampling=SHORT, on_stage=fail)
    assert fusion.answer(picture(), "What?", sampling=SHORT).token_ids == expected.token_ids
    with pytest.raises(UsageError, match="on_stage is 3; expected a function"):
        fusion.answer(picture(), "What?", on_stage=3)  # type: ignore[arg-type]


def test_a_cancel_from_on_stage(fusion: Fusion) -> None:
    def cancel(stage: str) -> None:
        if stage == PREFILL:
            fusion.cancel()

    with pytest.raises(Cancelled):
        fusion.answer(picture(), "What?", sampling=SHORT, on_stage=cancel)


# Close ---------------------------------------------------------------------------------------------------------------


def test_close_interrupts_the_run(stoppable: Fusion) -> None:
    blocked = block(stoppable, "prefill")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stoppable.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        stoppable.close()
        with pytest.raises(Cancelled, match="The model was closed in stage 'prefill'; load the bundle again"):
            running.result(20)
    assert blocked.closed == 1


def test_close_with_a_timeout(fusion: Fusion) -> None:
    """The question that runs on frees the model."""
    blocked = BlockedCall(fusion, "prefill")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fusion.answer, picture(), "What?", sampling=SHORT)
        assert blocked.reached.wait(20)
        with pytest.raises(FusionError, match=r"A question still runs after 0.05 s; the model is closed"):
            fusion.close(timeout=0.05)
        assert backend(fusion).closed == 0
        blocked.release()
        assert isinstance(running.exception(20), FusionError)
    assert backend(fusion).closed == 1
    assert not fusion.pipeline.images._entries
    fusion.close(timeout=5)
    fusion.close(timeout=1e300)
    for timeout in (-1, math.nan, "1"):
        with pytest.raises(UsageError, match=r"timeout is .*; expected a number of seconds from 0, or None"):
            fusion.close(timeout=timeout)  # type: ignore[arg-type]


# ONNX Runtime --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_onnx_runtime_stops_at_any_moment(tiny_bundle: Path, way: str) -> None:
    rng, sampling = random.Random(0), Sampling(max_new_tokens=40)
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8) for seed in range(3)]
    with load(tiny_bundle, threads=1) as fusion:
        expected = [fusion.answer(image, "What?", sampling=sampling).token_ids for image in pictures]
        fusion.clear_image_cache()
        started = time.monotonic()
        fusion.answer(pictures[0], "What?", sampling=sampling)
        duration = time.monotonic() - started
        stopped = 0
        for turn in range(30):
            image, moment = pictures[turn % 3], rng.uniform(1e-3, duration)
            timer = threading.Timer(moment, fusion.cancel if way == "cancel" else lambda: None)
            timer.start()
            answer: Answer
            try:
                answer = fusion.answer(
                    image, "What?", sampling=sampling, deadline=moment if way == "deadline" else None
                )
            except Stopped as error:
                answer = error.partial
            timer.join()
            stopped += not answer.is_complete
            assert answer.token_ids == expected[turn % 3][: len(answer.token_ids)]
            if turn % 5 == 0:
                assert fusion.answer(image, "What?", sampling=sampling).token_ids == expected[turn % 3]
        assert stopped >= 10


def test_a_superseded_stream_is_not_a_canceled_one(fusion: Fusion) -> None:
    stream = fusion.stream(picture(), "What?", sampling=SHORT)
    next(stream)
    fusion.answer(picture(), "Where?", sampling=SHORT)
    stream.cancel()
    with pytest.raises(FusionError, match=ENDED) as caught:
        next(stream)
    assert not isinstance(caught.value, Stopped)


def test_a_late_question_leaves_the_stream_before_it(fusion: Fusion) -> None:
    expected = fusion.answer(picture(), "What?", sampling=SHORT).text
    stream = fusion.stream(picture(), "What?", sampling=SHORT)
    for ask in (fusion.answer, fusion.stream):
        with pytest.raises(DeadlineExceeded, match="before the first stage") as caught:
            ask(picture(), "Where?", deadline=1e-9)
        assert caught.value.stage == WAITING
    assert "".join(stream).strip() == expected
