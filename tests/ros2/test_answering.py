"""Questions about frames, answered beside the executor of a node."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from fakes.watched_backend import BlockedCall, backend, picture
from fusion_edge_ros.answering import Answering
from fusion_edge_ros.frames import Frame
from fusion_edge_ros.questions import Question, Reply
from ros2.messages import Header

from fusion_edge import Fusion, Sampling

QUESTION = Question("What?")
TOKENS = 4


@dataclass
class Ended:
    """Waits for the end of a question."""

    replies: list[Reply] = field(default_factory=list)
    event: threading.Event = field(default_factory=threading.Event)

    def __call__(self, reply: Reply) -> None:
        self.replies.append(reply)
        self.event.set()

    def reply(self) -> Reply:
        assert self.event.wait(20)
        (reply,) = self.replies
        return reply


@pytest.fixture
def answering(watched: Fusion) -> Iterator[Answering]:
    answering = Answering(watched, capacity=2, max_new_tokens=TOKENS, query_length=None)
    yield answering
    answering.close()


def frame(seed: int = 0) -> Frame:
    return Frame(picture(seed), "rgb", Header())


def test_a_text(answering: Answering, watched: Fusion) -> None:
    stages: list[str] = []
    pieces: list[str] = []
    ended = Ended()
    request = answering.ask(QUESTION, frame(), ended, when_stage=stages.append, when_piece=pieces.append)
    reply = ended.reply()
    expected = watched.answer(picture(), "What?", sampling=Sampling(max_new_tokens=TOKENS))
    assert reply == Reply(expected.text, expected.finish_reason)
    assert "".join(pieces).strip() == reply.text
    assert stages[0] == "preprocess"
    assert "prefill" in stages
    assert request is not None
    assert request.done
    assert answering.latencies().answered == 1


def test_own_limit_of_tokens(answering: Answering, watched: Fusion) -> None:
    ended = Ended()
    answering.ask(Question("What?", max_new_tokens=1), frame(), ended)
    assert ended.reply().text == watched.answer(picture(), "What?", sampling=Sampling(max_new_tokens=1)).text


def test_choices_and_documents(answering: Answering, watched: Fusion) -> None:
    ended = Ended()
    answering.ask(Question("What?", choices=("yes", "no")), frame(), ended)
    choice = watched.choose(picture(), "What?", ("yes", "no"))
    assert ended.reply() == Reply(choice.text, "stop", probabilities=choice.probabilities)
    ended = Ended()
    answering.ask(Question("What?", schema={"enum": ["a", "b"]}, max_new_tokens=16), frame(), ended)
    assert ended.reply().document == watched.json(picture(), "What?", {"enum": ["a", "b"]})


def test_bgr_frames(answering: Answering, watched: Fusion) -> None:
    ended = Ended()
    answering.ask(QUESTION, Frame(picture()[:, :, ::-1], "bgr", Header()), ended)
    assert ended.reply().text == watched.answer(picture(), "What?", sampling=Sampling(max_new_tokens=TOKENS)).text


def test_only_the_newest_frame_of_a_key(answering: Answering, watched: Fusion) -> None:
    call = BlockedCall(watched, "encode")
    asked = [Ended() for _ in range(4)]
    for seed, ended in enumerate(asked):
        answering.ask(QUESTION, frame(seed), ended, key="image")
        assert call.reached.wait(20)
    assert asked[1].reply().finish_reason == asked[2].reply().finish_reason == "superseded"
    call.release()
    for seed in (0, 3):
        expected = watched.answer(picture(seed), "What?", sampling=Sampling(max_new_tokens=TOKENS)).text
        assert asked[seed].reply().text == expected


def test_a_full_queue(answering: Answering, watched: Fusion) -> None:
    call = BlockedCall(watched, "encode")
    asked = [Ended() for _ in range(4)]
    for ended in asked:
        answering.ask(QUESTION, frame(), ended)
        assert call.reached.wait(20)
    refused = asked[3].reply()  # one runs, two wait
    assert refused.finish_reason == "refused"
    assert "ask less often" in refused.error
    call.release()
    assert all(ended.reply().error == "" for ended in asked[:3])


def test_wrong_questions(answering: Answering) -> None:
    ended = Ended()
    assert answering.ask(Question("What?", schema={"type": "text"}), frame(), ended) is None
    assert ended.reply().finish_reason == "failed"
    ended = Ended()
    answering.ask(Question("What?", choices=("yes",)), frame(), ended)
    assert "expected at least two" in ended.reply().error


def test_a_deadline_while_it_waits(answering: Answering, watched: Fusion) -> None:
    call = BlockedCall(watched, "encode")
    running, late = Ended(), Ended()
    answering.ask(QUESTION, frame(), running)
    assert call.reached.wait(20)
    answering.ask(Question("What?", deadline=0.05), frame(), late)
    assert late.reply().finish_reason == "deadline"
    call.release()
    assert running.reply().error == ""


def test_a_cancel(answering: Answering, watched: Fusion) -> None:
    call = BlockedCall(watched, "prefill")
    ended = Ended()
    request = answering.ask(QUESTION, frame(), ended)
    assert call.reached.wait(20)
    assert request is not None
    request.cancel()
    call.release()
    assert ended.reply().finish_reason == "cancelled"


def test_a_defect_ends_the_question(answering: Answering, watched: Fusion) -> None:
    def fail(name: str) -> None:
        if name == "encode":
            raise KeyError(name)

    backend(watched).before = fail
    ended = Ended()
    answering.ask(QUESTION, frame(), ended)
    assert ended.reply() == Reply("", "failed", "KeyError('encode')")


def test_close_ends_all_questions(watched: Fusion) -> None:
    before = threading.enumerate()
    answering = Answering(watched, capacity=2, max_new_tokens=TOKENS, query_length=None)
    call = BlockedCall(watched, "encode")
    asked = [Ended(), Ended()]
    for ended in asked:
        answering.ask(QUESTION, frame(), ended)
    assert call.reached.wait(20)
    threading.Timer(0.1, call.release).start()
    answering.close()
    assert [ended.replies[0].finish_reason for ended in asked] == ["cancelled", "cancelled"]
    started = set(threading.enumerate()) - set(before)
    assert not [thread for thread in started if thread.name.startswith("fusion-edge")]


def test_ask_does_not_wait(answering: Answering, watched: Fusion) -> None:
    call = BlockedCall(watched, "encode")
    start = time.monotonic()
    asked = [Ended(), Ended()]
    answering.ask(QUESTION, frame(), asked[0], key="image")
    assert call.reached.wait(20)  # or the second frame would replace the first
    answering.ask(QUESTION, frame(), asked[1], key="image")
    assert not asked[0].event.is_set()
    assert time.monotonic() - start < 5
    call.release()
    assert asked[1].reply().error == ""
