"""Questions of several threads to one ``Fusion``: correct answers, in order of arrival."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
from fakes.watched_backend import (
    ENDED,
    QUESTIONS,
    SHORT,
    BlockedCall,
    backend,
    in_threads,
    picture,
    unless_ended,
    wait_for_arrival,
    watched_fusion,
)

from fusion_edge.runtime import Fusion, FusionError, Sampling


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    return watched_fusion(tiny_bundle)


def test_concurrent_answers_are_correct(fusion: Fusion) -> None:
    cases = [(picture(seed % 3), QUESTIONS[seed % 4]) for seed in range(12)]
    expected = [fusion.answer(image, question, sampling=SHORT).text for image, question in cases]
    backend(fusion).before = lambda name: time.sleep(random.random() / 1000)

    def ask(number: int) -> None:
        for turn in range(number, number + 6):
            image, question = cases[turn % 12]
            assert fusion.answer(image, question, sampling=SHORT).text == expected[turn % 12]

    in_threads(5, ask)


def test_concurrent_streams_are_correct_or_ended(fusion: Fusion) -> None:
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


def test_an_abandoned_stream_blocks_no_other_question(fusion: Fusion) -> None:
    stream = fusion.stream(picture(), "What?", sampling=SHORT)
    next(stream)
    in_threads(2, lambda _: fusion.answer(picture(), "Where?", sampling=SHORT))
    with pytest.raises(FusionError, match=ENDED):
        next(stream)
    for _ in range(20):
        next(fusion.ask(picture(), "What?", sampling=SHORT))
    gc.collect()
    fusion.answer(picture(), "Where?", sampling=SHORT)


def test_questions_are_answered_in_order_of_arrival(fusion: Fusion) -> None:
    blocked = BlockedCall(fusion, "prefill")
    order: list[int] = []

    def ask(number: int) -> None:
        fusion.answer(picture(), QUESTIONS[number % 4], sampling=SHORT)
        order.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        wait_for_arrival(fusion, thread.start)
        assert blocked.reached.wait(20)
    blocked.release()
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
