"""Questions of the demo have one right answer each, and balanced answers."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.pictures import (
    CATEGORIES,
    GENERIC_GUIDES,
    KINDS,
    LESSONS,
    NUMBERS,
    PICTURE_SIZE,
    SPLITS,
    THINGS,
    Scene,
    Thing,
)

WORDS = {"top": 0, "left": 0, "middle": 1, "bottom": 2, "right": 2}
SINGULAR = {kind.plural: name for name, kind in THINGS.items()} | {p: c for c, p in CATEGORIES.items()}


def _arrange(seed: int, split: str) -> Scene:
    return pictures.arrange(np.random.default_rng(seed), split)


scenes = st.builds(_arrange, st.integers(0, 2**32), st.sampled_from(SPLITS))


def third(coordinate: float) -> int:
    return int(coordinate // (PICTURE_SIZE / 3))


def where(thing: Thing) -> tuple[int, int]:
    """Column and row by the center's pixels, not by the cell."""
    return third(thing.center[0]), third(thing.center[1])


def place(thing: Thing) -> str:
    x, y = where(thing)
    return "middle" if x == y == 1 else f"{('top', 'middle', 'bottom')[y]} {('left', 'middle', 'right')[x]}"


def is_a(thing: Thing, noun: str) -> bool:
    return noun in ("thing", "things", thing.kind, THINGS[thing.kind].category)


def beside(scene: Scene, thing: Thing, relation: str) -> list[Thing]:
    """All things in a direction whose centers are less than half a cell off the straight line."""
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    offsets = [(other, np.subtract(other.center, thing.center)) for other in scene]
    return [other for other, offset in offsets if sign * offset[axis] > 64 and abs(offset[1 - axis]) < 64]


def right_answers(text: str, scene: Scene, it: Thing | None = None) -> list[str]:
    """Return every answer that the words of a question allow, by a search through all things."""
    if it is None and len(scene) == 1:
        it = scene.things[0]
    if text == "What color is the background?":
        return [scene.background]
    if text in ("Which thing does not belong?", "Which thing is of another kind?"):
        return [
            thing.kind
            for thing in scene
            if len({t.category for t in scene if t is not thing}) == 1
            and all(t.category != thing.category for t in scene if t is not thing)
        ]
    if match := re.fullmatch(r"How many (\w+) are there\?", text):
        return [NUMBERS[sum(is_a(thing, SINGULAR.get(match[1], match[1])) for thing in scene)]]
    if match := re.fullmatch(r"Is there an? (\w+)\?", text):
        return ["yes" if any(is_a(thing, match[1]) for thing in scene) else "no"]
    if match := re.fullmatch(r"What (kind of thing )?is (?:at|in) the ([\w ]+)\?", text):
        found = [thing for thing in scene if place(thing) == match[2]]
        return [thing.category if match[1] else thing.kind for thing in found] or ["nothing"]
    if match := re.fullmatch(r"What is (left of|right of|above|below) (?:it|the (\w+))\?", text):
        subjects = [t for t in scene if t.kind == match[2]] if match[2] else [it] if it else []
        return [other.kind for subject in subjects for other in beside(scene, subject, match[1])]
    if match := re.fullmatch(r"Where is (?:it|the (\w+))\?", text):
        return [place(t) for t in scene if t.kind == match[1] or (not match[1] and t is it)]
    assert it is not None, text
    return {"What is it?": [it.kind], "What kind of thing is it?": [it.category]}[text]


@settings(deadline=None, max_examples=60)
@given(scenes)
def test_questions_have_one_right_answer(scene: Scene) -> None:
    for make in (KINDS | LESSONS).values():
        for text, answer in make(scene).items():
            assert right_answers(text, scene) == [answer], text


@settings(deadline=None, max_examples=60)
@given(scenes)
def test_every_kind_of_question_that_could_be_asked_is(scene: Scene) -> None:
    """Of one thing in a row, there is a relation; of a scene with an odd one, the question for it."""
    relations = KINDS["relation"](scene)
    counts = Counter(thing.kind for thing in scene)
    for thing, relation in itertools.product(scene, ("left of", "right of", "above", "below")):
        is_clear = counts[thing.kind] == 1 and len(beside(scene, thing, relation)) == 1
        assert (f"What is {relation} the {thing.kind}?" in relations) == is_clear
    odd = right_answers("Which thing does not belong?", scene) if len(scene) > 2 else []
    assert bool(KINDS["odd"](scene)) == (len(odd) == 1)
    assert len(KINDS["what"](scene)) == len(scene) + (len(scene) == 1)
    assert {"yes", "no"} == set(KINDS["presence"](scene).values())


@settings(deadline=None, max_examples=60)
@given(scenes, st.integers(0, 2**32), st.integers(1, 12))
def test_questions_about_a_picture_differ(scene: Scene, seed: int, count: int) -> None:
    asked = pictures.ask(scene, np.random.default_rng(seed), count)
    assert len({question.text for question in asked}) == count
    assert all(KINDS[question.kind](scene)[question.text] == question.answer for question in asked)
    assert asked == pictures.ask(scene, np.random.default_rng(seed), count)


def test_answers_are_short() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        for question in pictures.ask(pictures.arrange(rng), rng, 10, KINDS | LESSONS):
            assert len(question.answer.split()) <= 2


def test_lessons_are_asked_only_on_demand() -> None:
    rng = np.random.default_rng(3)
    asked = [question.kind for _ in range(100) for question in pictures.ask(pictures.arrange(rng), rng, 5)]
    both = KINDS | LESSONS
    taught = [question.kind for _ in range(100) for question in pictures.ask(pictures.arrange(rng), rng, 5, both)]
    assert set(asked) == KINDS.keys()
    assert set(taught) == KINDS.keys() | LESSONS.keys()


@pytest.fixture(scope="module")
def asked() -> list[pictures.Question]:
    rng = np.random.default_rng(1)
    return [question for _ in range(3000) for question in pictures.ask(pictures.arrange(rng), rng, 3)]


@pytest.mark.parametrize("kind", ["presence", "category", "background"])
def test_answers_are_balanced(asked: list[pictures.Question], kind: str) -> None:
    answers = Counter(question.answer for question in asked if question.kind == kind)
    even = sum(answers.values()) / len(answers)
    assert all(0.75 * even < count < 1.25 * even for count in answers.values()), answers


@pytest.mark.parametrize(("kind", "most"), [("what", 0.03), ("relation", 0.03), ("odd", 0.04), ("count", 0.4)])
def test_no_answer_is_worth_guessing(asked: list[pictures.Question], kind: str, most: float) -> None:
    answers = Counter(question.answer for question in asked if question.kind == kind)
    assert max(answers.values()) < most * sum(answers.values()), answers.most_common(3)
    assert len(answers) >= (len(NUMBERS) if kind == "count" else 90)


def test_every_kind_is_asked_often_enough(asked: list[pictures.Question]) -> None:
    kinds = Counter(question.kind for question in asked)
    assert min(kinds.values()) > 0.03 * len(asked), kinds


def test_absent_things_are_often_of_a_category_that_is_there() -> None:
    rng = np.random.default_rng(4)
    same = other = 0
    for _ in range(300):
        scene = pictures.arrange(rng)
        categories = {thing.category for thing in scene}
        for text, answer in KINDS["presence"](scene).items():
            if answer == "no":
                is_same = THINGS[text[:-1].split()[-1]].category in categories
                same, other = same + is_same, other + (not is_same)
    assert 0.3 < same / (same + other) < 0.7


@settings(deadline=None, max_examples=60)
@given(scenes, st.integers(0, 2**32), st.integers(1, 6))
def test_conversations_have_one_right_answer_each(scene: Scene, seed: int, turns: int) -> None:
    """ "it" is the thing that was an answer last; questions for a place or by a name make its meaning plain."""
    questions = pictures.conversation(scene, np.random.default_rng(seed), turns)
    assert len({question.text for question in questions}) == len(questions) == turns
    its: list[Thing | None] = [None]
    for question in questions:
        assert question.kind in KINDS.keys() | LESSONS.keys()
        answers = {answer for it in its for answer in right_answers(question.text, scene, it)}
        assert answers == {question.answer}, (question, questions)
        assert (" it?" in question.text and len(scene) > 1) <= (its != [None])
        if match := re.fullmatch(r"What is (left of|right of|above|below) it\?", question.text):
            its = [other for it in its if it for other in beside(scene, it, match[1])]
        elif match := re.fullmatch(r"What is (?:at|in) the ([\w ]+)\?", question.text):
            its = [thing for thing in scene if place(thing) == match[1]]
        elif question.text.startswith("Which"):
            its = [thing for thing in scene if thing.kind == question.answer]
    assert len(its) == 1


def test_conversations_refer_back_and_move_on() -> None:
    rng = np.random.default_rng(6)
    talks = [pictures.conversation(pictures.arrange(rng), rng, 4) for _ in range(250)]
    texts = Counter(question.text for talk in talks for question in talk[1:])
    for follow in ("What is left of it?", "What is below it?", "What kind of thing is it?", "Where is it?"):
        assert texts[follow] > 10
    assert all(any(" it?" in question.text for question in talk[1:]) for talk in talks)


def test_generic_guides_differ_and_ask_for_nothing_in_particular() -> None:
    assert len(set(GENERIC_GUIDES)) == len(GENERIC_GUIDES) >= 4
    nouns = THINGS.keys() | CATEGORIES.keys()
    assert not any(word in nouns for guide in GENERIC_GUIDES for word in re.findall(r"\w+", guide.lower()))


def test_more_questions_than_there_are_is_an_error() -> None:
    scene = pictures.arrange(np.random.default_rng(0))
    with pytest.raises(ValueError, match="background have 1 questions about this scene, fewer than 2"):
        pictures.ask(scene, np.random.default_rng(0), 2, {"background"})
