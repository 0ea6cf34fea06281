"""Requests to an asker: order, keys, full queues, deadlines, cancels, callbacks and close."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.watched_backend import QUESTIONS, SHORT, BlockedCall, backend, in_threads, picture, watched_fusion

from fusion_edge.runtime import (
    Answer,
    Asker,
    Cancelled,
    DeadlineExceeded,
    Fusion,
    FusionError,
    QueueFull,
    Request,
    Sampling,
    Superseded,
    UsageError,
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


def test_a_request_gives_the_model_s_answer(fusion: Fusion, asker: Asker) -> None:
    request = asker.submit(picture(), "What?", sampling=SHORT)
    assert request.result(20).text == text(fusion)
    assert request.done
    assert request.age > 0
    assert request.stage != "waiting"


def test_answers_of_many_threads_belong_to_their_frames(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(capacity=100)
    expected = {(seed, question): text(fusion, seed, question) for seed in range(3) for question in QUESTIONS}
    assert len(set(expected.values())) > 6

    def ask(number: int) -> None:
        for turn in range(number, number + 12):
            seed, question = turn % 3, QUESTIONS[turn % 4]
            request = asker.submit(picture(seed), question, sampling=SHORT)
            assert "".join(request).strip() == request.result().text == expected[seed, question]

    in_threads(4, ask)
    assert asker.latencies().answered == 48


def test_a_newer_frame_replaces_one_that_waits(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker) as running:
        old = asker.submit(picture(1), "What?", key="front", sampling=SHORT)
        other = asker.submit(picture(1), "What?", key="rear", sampling=SHORT)
        new = asker.submit(picture(2), "What?", key="front", sampling=SHORT)
        assert old.done
        with pytest.raises(Superseded, match="A newer frame of the same key") as error:
            old.result()
        assert (error.value.stage, error.value.partial.text) == ("waiting", "")
        assert not running.done  # only waiting requests are replaced
    assert new.result(20).text == text(fusion, 2)
    assert other.result().text == text(fusion, 1)
    assert asker.latencies().superseded == 1


def test_cameras_of_different_rates_take_turns(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker):
        asker.submit(picture(1), "What?", key="fast", sampling=SHORT)
        slow = asker.submit(picture(2), "What?", key="slow", sampling=SHORT)
        last = asker.submit(picture(3), "What?", key="fast", sampling=SHORT)
    assert done_order({"slow": slow, "fast": last}) == ["fast", "slow"]  # the place of the first frame


def test_priorities(fusion: Fusion, asker: Asker) -> None:
    with busy(fusion, asker):
        requests = {
            str(priority): asker.submit(picture(), "What?", priority=priority, sampling=SHORT)
            for priority in (0, -3, 7)
        }
    assert done_order(requests) == ["7", "0", "-3"]


def test_drop_oldest(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(capacity=2)
    with busy(fusion, asker):
        first, second, third = (asker.submit(picture(n), "What?", sampling=SHORT) for n in range(3))
        with pytest.raises(QueueFull, match="left it for a newer one"):
            first.result()
        low = asker.submit(picture(), "What?", priority=-1)
        assert low.done  # all others are more urgent
        assert not second.done
        assert not third.done
    assert second.result(20).text == text(fusion, 1)
    assert asker.latencies().dropped == 2


def test_refuse(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(capacity=1, when_full="refuse")
    with busy(fusion, asker):
        request = asker.submit(picture(), "What?", key="front", sampling=SHORT)
        with pytest.raises(QueueFull, match=r"The queue is full: 1 requests wait"):
            asker.submit(picture(), "What?")
        newer = asker.submit(picture(1), "What?", key="front", sampling=SHORT)  # takes no room
    assert request.done
    assert newer.result(20).text == text(fusion, 1)
    assert asker.latencies().dropped == 1


def blocked_submit(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Thread, list[Request[Answer]]]:
    """Submit in a thread, and return when it waits for room."""
    room, blocked = asker._worker._room, threading.Event()
    wait = room.wait

    def wait_for_room(timeout: float | None = None) -> bool:
        blocked.set()
        return wait(timeout)

    monkeypatch.setattr(room, "wait", wait_for_room)
    requests: list[Request[Answer]] = []
    thread = threading.Thread(target=lambda: requests.append(asker.submit(picture(), "What?", sampling=SHORT)))
    thread.start()
    assert blocked.wait(20)
    return thread, requests


def test_wait(fusion: Fusion, make: MakeAsker, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = make(capacity=1, when_full="wait")
    with busy(fusion, asker):
        first = asker.submit(picture(1), "What?", sampling=SHORT)
        thread, requests = blocked_submit(asker, monkeypatch)
        assert requests == []
    thread.join(20)
    assert requests[0].result(20).text == text(fusion)
    assert first.result(0).text == text(fusion, 1)


def test_wait_ends_at_the_deadline(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(capacity=1, when_full="wait")
    with busy(fusion, asker):
        asker.submit(picture(), "What?", sampling=SHORT)
        request = asker.submit(picture(), "What?", deadline=0.02)
        with pytest.raises(DeadlineExceeded):
            request.result(0)


def test_wait_ends_when_another_request_s_deadline_makes_room(
    fusion: Fusion, make: MakeAsker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = make(capacity=1, when_full="wait")
    with busy(fusion, asker):
        late = asker.submit(picture(), "What?", deadline=0.5)
        thread, requests = blocked_submit(asker, monkeypatch)
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(DeadlineExceeded):
            late.result(0)
    assert requests[0].result(20).text == text(fusion)


def test_close_ends_a_submit_that_waits(fusion: Fusion, make: MakeAsker, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = make(capacity=1, when_full="wait")
    with busy(fusion, asker):
        asker.submit(picture(), "What?")
        thread, requests = blocked_submit(asker, monkeypatch)
        with pytest.raises(FusionError, match=r"A request still runs after 0\.01 s; the asker is closed"):
            asker.close(timeout=0.01)
        thread.join(20)
        with pytest.raises(Cancelled):
            requests[0].result(0)


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


def test_close(fusion: Fusion, make: MakeAsker) -> None:
    asker = make()
    called = threading.Event()
    call = BlockedCall(fusion, "encode")
    running = asker.submit(picture(), "What?")
    assert call.reached.wait(20)
    waiting = asker.submit(picture(), "What?")
    waiting.add_done_callback(lambda _: called.set())
    closing = threading.Thread(target=asker.close)
    closing.start()
    with pytest.raises(Cancelled):
        waiting.result(20)
    call.release()
    closing.join(20)
    with pytest.raises(Cancelled):
        running.result(0)
    assert called.is_set()
    asker.close()
    with pytest.raises(UsageError, match="This asker has been closed"):
        asker.submit(picture(), "What?")
    late = threading.Event()
    running.add_done_callback(lambda _: late.set())
    assert late.is_set()
    assert text(fusion)  # the model stays open


def test_close_in_a_callback(fusion: Fusion, make: MakeAsker) -> None:
    asker = make()
    with busy(fusion, asker) as request:
        waiting = asker.submit(picture(), "What?")
        request.add_done_callback(lambda _: asker.close())
    with pytest.raises(Cancelled):
        waiting.result(20)


def test_a_callback_after_close_may_wait_for_other_threads(asker: Asker) -> None:
    request = asker.submit(picture(), "What?", sampling=SHORT)
    expected = request.result(20)
    asker.close()
    found: list[Answer] = []

    def wait(done: Request[Answer]) -> None:
        thread = threading.Thread(target=lambda: found.append(done.result()), daemon=True)
        thread.start()
        thread.join(5)

    request.add_done_callback(wait)
    assert found == [expected]


class NoContext(threading.Condition):
    """A condition whose ``__enter__`` Ctrl-C would interrupt, with the lock taken."""

    def __enter__(self) -> bool:
        raise AssertionError


def test_ctrl_c_leaves_no_lock_behind(asker: Asker) -> None:
    request = asker.submit(picture(), "What?", sampling=SHORT)
    for conditions in (request, asker._worker):
        for name, value in vars(conditions).items():
            if isinstance(value, threading.Condition):
                value.__class__ = NoContext
                assert isinstance(getattr(conditions, name), NoContext)
    request.add_done_callback(lambda _: None)
    assert request.result(20).text == "".join(request).strip()
    assert asker.submit(picture(), "What?", sampling=SHORT).result(20) is not None


def test_a_model_that_is_closed_fails_the_requests(fusion: Fusion, asker: Asker) -> None:
    fusion.close()
    with pytest.raises(UsageError, match="This model has been closed"):
        asker.submit(picture(), "What?").result(20)


def test_other_questions_to_the_model_take_turns(fusion: Fusion, asker: Asker) -> None:
    expected = text(fusion)

    def ask(number: int) -> None:
        for _ in range(10):
            if number % 2:
                assert asker.submit(picture(), "What?", sampling=SHORT).result(20).text == expected
            else:
                assert text(fusion) == expected

    in_threads(4, ask)


def test_an_asker_that_is_garbage_answers_and_ends(fusion: Fusion) -> None:
    asker = Asker(fusion)
    with busy(fusion, asker):
        request = asker.submit(picture(), "What?", sampling=SHORT)
        del asker
        gc.collect()
    assert request.result(20).text == text(fusion)


def in_a_fork(work: Callable[[], object]) -> str:
    """Call ``work`` in a forked process, 20 seconds at most. Return its value, or its error, as text."""
    read, write = os.pipe()
    if os.fork() == 0:  # the child
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            os.write(write, str(work()).encode())
        except BaseException as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        return pipe.read()


def test_a_forked_process_makes_its_own_asker(fusion: Fusion, asker: Asker) -> None:
    request = asker.submit(picture(), "What?", deadline=60, sampling=SHORT)
    assert request.result(20)
    refused: list[Callable[[], object]] = [
        lambda: asker.submit(picture(), "What?"),
        asker.latencies,
        request.result,
        lambda: list(request),
        lambda: request.add_done_callback(print),
        lambda: asyncio.run(_result(request)),
    ]
    harmless: list[Callable[[], object]] = [asker.close, request.cancel, asker._worker.abandon, lambda: request.done]
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with asker._worker.lock:
            held.set()
            assert over.wait(60)

    thread = threading.Thread(target=hold)  # the fork inherits the lock, but not the thread that would release it
    thread.start()
    assert held.wait(20)
    try:
        for work in refused:
            expected = r"This process is a fork of process \d+, which made the asker; make one after the fork\."
            assert re.fullmatch(expected, in_a_fork(work))
        assert [in_a_fork(work) for work in harmless] == ["None", "None", "None", "True"]
    finally:
        over.set()
        thread.join(20)
    assert asker.submit(picture(), "What?", sampling=SHORT).result(20).text == text(fusion)


async def _result(request: Request[Answer]) -> Answer:
    return await request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity is 0; expected an integer from 1"),
        ({"capacity": 1.5}, "capacity is 1.5"),
        ({"when_full": "block"}, "when_full is 'block'; expected one of 'drop_oldest', 'refuse', 'wait'"),
        ({"when_full": []}, "when_full is []"),
        ({"skip_unchanged": 1}, "skip_unchanged is 1; expected True or False"),
    ],
)
def test_wrong_arguments_of_an_asker(fusion: Fusion, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Asker(fusion, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": 0}, "deadline is 0; expected a number of seconds above 0"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"priority": 1.5}, "priority is 1.5; expected an integer"),
        ({"priority": True}, "priority is True"),
        ({"key": []}, "key is []; expected a value with a hash"),
        ({"on_stage": 3}, "on_stage is 3; expected a function"),
    ],
)
def test_wrong_arguments_of_a_request(asker: Asker, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        asker.submit(picture(), "What?", **options)
    assert str(error.value).startswith(message)
    assert asker.latencies().failed == 0


SCHEMA = {"type": "object", "properties": {"clear": {"type": "boolean"}}, "required": ["clear"]}


def test_documents(fusion: Fusion, make: MakeAsker) -> None:
    pytest.importorskip("llguidance")
    asker = make(skip_unchanged=True)
    document = fusion.json(picture(), "Is the path clear?", SCHEMA)
    request = asker.submit_json(picture(), "Is the path clear?", SCHEMA, key="front")
    assert request.result(20) == document
    assert isinstance(document["clear"], bool)
    assert list(request) == []
    again = asker.submit_json(picture(), "Is the path clear?", SCHEMA, key="front")
    text = asker.submit(picture(), "Is the path clear?", key="front text", sampling=SHORT)
    assert again.result(20) == document
    assert again.is_unchanged
    assert text.result(20).text != str(document)


def test_a_cut_document_is_an_error(fusion: Fusion, asker: Asker) -> None:
    pytest.importorskip("llguidance")
    call = BlockedCall(fusion, "decode")
    request = asker.submit_json(picture(), "What?", {"type": "string", "minLength": 300})
    assert call.reached.wait(20)
    request.cancel()
    call.release()
    with pytest.raises(Cancelled, match="within the JSON document"):
        request.result(20)
    assert asker.latencies().cancelled == 1


def test_an_unusable_schema_is_refused_at_once(asker: Asker) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(UsageError):
        asker.submit_json(picture(), "What?", {"type": "no type"})


def test_choices(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(skip_unchanged=True)
    expected = fusion.choose(picture(), "Is the path clear?", ("yes", "no"))
    request = asker.submit_choose(picture(), "Is the path clear?", ["yes", "no"], key="front")
    choice = request.result(20)
    assert (choice.text, choice.probabilities) == (expected.text, expected.probabilities)
    assert list(request) == []
    again = asker.submit_choose(picture(), "Is the path clear?", ("yes", "no"), key="front")
    assert again.result(20) is choice
    assert again.is_unchanged
    other = asker.submit_choose(picture(), "Is the path clear?", ("no", "yes"), key="front")
    assert other.result(20).text == expected.text
    assert not other.is_unchanged
    for wrong in (("yes",), ("yes", "yes"), 3):
        with pytest.raises(UsageError):
            asker.submit_choose(picture(), "Is the path clear?", wrong).result(20)  # type: ignore[arg-type]


def test_a_choice_is_canceled(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "prefill")
    request = asker.submit_choose(picture(), "What?", ("yes", "no"))
    assert call.reached.wait(20)
    request.cancel()
    call.release()
    with pytest.raises(Cancelled, match="prefill"):
        request.result(20)


def test_scenes(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(skip_unchanged=True)
    with fusion.look(picture(), guide="What?") as scene:
        request = asker.submit(scene, "What?", key="front", sampling=SHORT)
        assert "".join(request).strip() == request.result(20).text == text(fusion)
        choice = asker.submit_choose(scene, "What?", ("yes", "no")).result(20)
        assert choice.probabilities == pytest.approx(fusion.choose(picture(), "What?", ("yes", "no")).probabilities)
    with pytest.raises(UsageError, match="closed"):
        asker.submit(scene, "What?").result(20)


def test_a_scene_of_another_model_is_refused(asker: Asker, tiny_bundle: Path) -> None:
    with watched_fusion(tiny_bundle) as other, pytest.raises(UsageError, match="The scene is of another model"):
        asker.submit(other.look(picture()), "What?")
