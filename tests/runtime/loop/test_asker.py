"""Requests to an asker: order, keys, priorities and full queues."""

from __future__ import annotations

import threading

import pytest
from fakes.watched_backend import QUESTIONS, SHORT, in_threads, picture
from support.askers import MakeAsker, busy, done_order, text

from fusion_edge.runtime import (
    Answer,
    Asker,
    Cancelled,
    DeadlineExceeded,
    Fusion,
    FusionError,
    QueueFull,
    Request,
    Superseded,
)


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
