"""The life of an asker: close, garbage, forks and wrong arguments."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fakes.watched_backend import SHORT, BlockedCall, in_threads, picture
from support.askers import MakeAsker, busy, text

from fusion_edge.runtime import (
    Answer,
    Asker,
    Cancelled,
    Fusion,
    Request,
    UsageError,
)


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
