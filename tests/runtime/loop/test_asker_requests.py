"""A request of an asker: deadlines, cancels, pieces, callbacks and frames."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import numpy as np
import pytest
from fakes.watched_backend import SHORT, BlockedCall, backend, picture
from support.askers import MakeAsker, busy, text

from fusion_edge.runtime import (
    Answer,
    Asker,
    Cancelled,
    DeadlineExceeded,
    Fusion,
    FusionError,
    Request,
    Sampling,
    UsageError,
)


def test_a_deadline_passes_while_a_request_waits(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker):
        request = asker.submit(picture(), "What?", deadline=0.01)
        with pytest.raises(DeadlineExceeded, match="passed before the first stage") as error:
            request.result(20)
        assert error.value.partial.finish_reason == "deadline"
        assert request.age < 10  # ended without the thread, which is still busy
        with pytest.raises(DeadlineExceeded):
            list(asker.submit(picture(), "What?", deadline=0.01))
    assert asker.latencies().late == 2


def test_a_deadline_passes_while_a_loop_polls(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker) as running:
        request = asker.submit(picture(), "What?", deadline=60)
        assert not request.done
        request.control.due = running.control.due = 0.0  # now
        assert request.done
        assert not running.done  # its thread ends it


def test_a_deadline_passes_while_a_request_runs(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "decode")
    request = asker.submit(picture(), "What?", deadline=0.5, sampling=Sampling(max_new_tokens=60))
    assert call.reached.wait(20)
    request.control.due = 0.0  # now
    call.release()
    answer = request.result(20)
    assert answer.finish_reason == "deadline"
    assert answer.token_ids
    assert asker.latencies().late == 1


def test_cancel_while_waiting(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker):
        request = asker.submit(picture(), "What?")
        request.cancel()
        assert request.done
        with pytest.raises(Cancelled):
            request.result()
    request.cancel()  # nothing happens
    assert asker.latencies().cancelled == 1


def test_cancel_while_running(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker) as request:
        waiting = asker.submit(picture(), "What?", sampling=SHORT)
        request.cancel()
    with pytest.raises(Cancelled) as error:
        request.result(20)
    assert error.value.stage == request.stage == "encode global crops"
    assert waiting.result(20).text == text(fusion)  # the next one is not affected


def test_cancel_within_the_answer_keeps_its_text(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "decode")
    request = asker.submit(picture(), "What?", sampling=Sampling(max_new_tokens=60))
    assert call.reached.wait(20)
    request.cancel()
    call.release()
    assert request.result(20).finish_reason == "cancelled"
    assert request.result().text == "".join(request).strip()
    assert asker.latencies().cancelled == 1


def test_timeout_of_result(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker) as request:
        with pytest.raises(TimeoutError, match="its stage is 'encode global crops'"):
            request.result(0)
        with pytest.raises(TimeoutError):
            request.result(0.01)
    assert request.result(20)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
def test_wrong_timeouts(asker: Asker, timeout: Any) -> None:
    request = asker.submit(picture(), "What?", sampling=SHORT)
    with pytest.raises(UsageError, match=r"timeout is .*; expected a number of seconds from 0, or None"):
        request.result(timeout)
    with pytest.raises(UsageError, match=r"timeout is .*; expected a number of seconds from 0, or None"):
        asker.close(timeout)


def test_pieces_come_as_they_are_generated(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "decode")
    request = asker.submit(picture(), "What?", sampling=Sampling(max_new_tokens=60))
    pieces = iter(request)
    assert call.reached.wait(20)  # after the first token
    call.release()
    first = next(pieces)
    assert "".join([first, *pieces]).strip() == request.result().text
    assert len(list(request)) > 1  # a second consumer gets the same


def test_an_abandoned_iteration_does_not_stop_the_request(fusion: Fusion, asker: Asker) -> None:
    for number in range(3):
        request = asker.submit(picture(), "What?", sampling=SHORT)
        for _ in request:
            break
        assert asker.submit(picture(number), "What?", sampling=SHORT).result(20).text == text(fusion, number)
        assert request.done


def test_an_error_of_the_question_is_the_result_s(asker: Asker) -> None:
    request = asker.submit("no such file.png", "What?")
    for _ in range(2):
        with pytest.raises(FusionError, match="does not exist"):
            request.result(20)
    with pytest.raises(FusionError, match="does not exist"):
        list(request)
    with pytest.raises(UsageError, match="of type list"):
        asker.submit([], "What?").result(20)  # type: ignore[arg-type]
    assert asker.latencies().failed == 2


def test_callbacks(fusion: Fusion, asker: Asker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "fusion_edge")
    called: list[tuple[str, str]] = []
    ended = threading.Event()

    def fail(_: object) -> None:
        raise ZeroDivisionError

    def leave(_: object) -> None:
        raise SystemExit

    with busy(fusion, asker) as running:
        old = asker.submit(picture(1), "What?", key="front")
        for request, name in ((old, "old"), (running, "running")):
            request.add_done_callback(fail)
            request.add_done_callback(leave)
            request.add_done_callback(
                lambda done, name=name: called.append((name, threading.current_thread().name))  # type: ignore[misc]
            )
        asker.submit(picture(2), "What?", key="front", sampling=SHORT).add_done_callback(lambda _: ended.set())
        assert called == []
    assert ended.wait(20)
    assert called == [("old", "fusion-edge asker"), ("running", "fusion-edge asker")]
    assert [record.message for record in caplog.records] == ["A callback raised an exception."] * 4
    late = threading.Event()
    running.add_done_callback(lambda _: late.set())
    assert late.wait(20)


def test_a_callback_cannot_wait(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(capacity=1, when_full="wait")
    errors: list[str] = []
    ended = threading.Event()

    def wait(_: object) -> None:
        for wrong in (
            lambda: asker.submit(picture(), "What?").result(),
            lambda: list(asker.submit(picture(), "What?")),
            lambda: asker.submit(picture(), "What?", sampling=SHORT),
        ):
            try:
                wrong()
            except UsageError as error:
                errors.append(str(error))
        ended.set()

    asker.submit(picture(), "What?", sampling=SHORT).add_done_callback(wait)
    assert ended.wait(20)
    assert errors == ["A callback cannot wait: the asker's thread, which runs it, would wait for itself."] * 3


def test_on_stage_and_its_exception(fusion: Fusion, asker: Asker) -> None:
    stages: list[str] = []
    assert asker.submit(picture(), "What?", on_stage=stages.append, sampling=SHORT).result(20)
    assert stages[0] == "preprocess"
    assert "prefill" in stages

    def fail(stage: str) -> None:
        raise ZeroDivisionError(stage)

    request = asker.submit(picture(), "What?", on_stage=fail)
    with pytest.raises(ZeroDivisionError, match="preprocess"):
        request.result(20)
    assert asker.submit(picture(), "What?", sampling=SHORT).result(20).text == text(fusion)


def test_an_array_is_copied(fusion: Fusion, asker: Asker) -> None:
    frame = picture(5)
    with busy(fusion, asker):
        request = asker.submit(frame, "What?", sampling=SHORT)
        frame[:] = 0
    assert request.result(20).text == text(fusion, 5)


def test_unchanged_frames_are_skipped(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(skip_unchanged=True)

    def ask(seed: int, question: str = "What?", key: str | None = "front") -> tuple[bool, str]:
        request = asker.submit(picture(seed), question, key=key, sampling=SHORT)
        pieces = "".join(request).strip()
        assert pieces == request.result().text == text(fusion, seed, question)
        return request.is_unchanged, pieces

    first = ask(1)
    calls = len(backend(fusion).calls)
    assert ask(1) == (True, first[1])
    assert not first[0]
    assert [ask(1, "Where?")[0], ask(1, "Where?")[0], ask(2, "Where?")[0], ask(1, "Where?")[0]] == [
        False,
        True,
        False,
        False,
    ]
    assert [ask(1, key="rear")[0], ask(1, key=None)[0], ask(1, key=None)[0], ask(1, key="rear")[0]] == [
        False,
        False,
        False,
        True,
    ]
    assert len(backend(fusion).calls) > calls
    figures = asker.latencies()
    assert (figures.answered, figures.unchanged) == (10, 3)


def test_only_complete_answers_are_given_again(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(skip_unchanged=True)
    call = BlockedCall(fusion, "decode")
    request = asker.submit(picture(), "What?", key="front", sampling=Sampling(max_new_tokens=60))
    assert call.reached.wait(20)
    request.cancel()
    call.release()
    assert request.result(20).finish_reason == "cancelled"
    again = asker.submit(picture(), "What?", key="front", sampling=Sampling(max_new_tokens=60))
    assert again.result(20).finish_reason != "cancelled"
    assert not again.is_unchanged


def test_kept_frames_are_bounded(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(skip_unchanged=True)
    for key in range(20):
        asker.submit(picture(), "What?", key=key, sampling=SHORT).result(20)
    again = [asker.submit(picture(), "What?", key=key, sampling=SHORT) for key in (19, 0)]
    assert all(request.result(20) for request in again)
    assert [request.is_unchanged for request in again] == [True, False]


class Frame(np.ndarray[Any, Any]):
    """An array that can be found."""


def frames() -> int:
    return sum(isinstance(thing, Frame) for thing in gc.get_objects())


def test_nothing_keeps_a_frame_after_the_end(fusion: Fusion, asker: Asker) -> None:
    def submit(**options: Any) -> Request[Answer]:
        return asker.submit(picture().view(Frame), "What?", sampling=SHORT, **options)

    def fail(stage: str) -> None:
        raise ZeroDivisionError(stage)

    gc.collect()
    gc.disable()  # no cycle may hold a frame
    try:
        with busy(fusion, asker):
            superseded, answered = submit(key="front"), submit(key="front")
            late, canceled = submit(deadline=0.001), submit()
            canceled.cancel()
            assert frames() == 2
        failed = [superseded, late, canceled, submit(color="gray"), submit(on_stage=fail)]
        assert answered.result(20)
        for request in failed:
            with pytest.raises((FusionError, ZeroDivisionError)):
                request.result(20)
        assert frames() == 0
    finally:
        gc.enable()
