"""Questions about the demo's scenes, with their only right answers.

No question is ambiguous, and the answers of each kind are balanced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from fusion_edge.benchmarks.demo.arrangement import GRID, PLACES, Scene, Thing
from fusion_edge.benchmarks.demo.atlas import CATEGORIES
from fusion_edge.benchmarks.demo.atlas import KINDS as THINGS

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Step to the next row and column."""
GENERIC_GUIDES = (
    "What is in the picture?",
    "Describe the scene.",
    "What do you see?",
    "List the things in the picture.",
    "Look at the picture and answer the question.",
)
"""Texts that guide the alignment and ask for nothing in particular."""


@dataclass(frozen=True)
class Question:
    """Question about a scene, its only correct answer, and its kind (a key of :data:`KINDS` or :data:`LESSONS`)."""

    text: str
    answer: str
    kind: str


Options = dict[str, str]
"""Questions of one kind about a scene, and their answers."""


def ask(scene: Scene, rng: np.random.Generator, count: int, kinds: Collection[str] | None = None) -> list[Question]:
    """Return ``count`` different questions about the scene, with kinds drawn evenly from those that apply.

    ``kinds`` are keys of :data:`KINDS` and :data:`LESSONS`, by default all of the former. Raises ValueError if they
    have fewer questions about the scene.
    """
    makers = KINDS if kinds is None else {kind: make for kind, make in (KINDS | LESSONS).items() if kind in kinds}
    choices = {kind: options for kind, make in makers.items() if (options := make(scene))}
    applying = list(choices)
    possible = len({text for options in choices.values() for text in options})
    if possible < count:
        raise ValueError(f"{', '.join(makers)} have {possible} questions about this scene, fewer than {count}")
    asked: dict[str, Question] = {}
    while len(asked) < count:
        kind = applying[rng.integers(len(applying))]
        question = _draw(choices[kind], kind, rng)
        asked[question.text] = question
    return list(asked.values())


def _draw(options: Options, kind: str, rng: np.random.Generator) -> Question:
    """Draw the answer before the question: that balances the answers."""
    answers = sorted(set(options.values()))
    answer = answers[rng.integers(len(answers))]
    texts = [text for text, value in options.items() if value == answer]
    return Question(texts[rng.integers(len(texts))], answer, kind)


def neighbor(scene: Scene, thing: Thing, relation: str) -> Thing | None:
    """Return the only thing in a direction within the row or column of another, None if there is no or more than one.

    ``relation`` is a key of :data:`RELATIONS`.
    """
    down, right = RELATIONS[relation]
    cells = {(thing.cell[0] + n * down, thing.cell[1] + n * right) for n in range(1, GRID)}
    found = [other for other in scene if other.cell in cells]
    return found[0] if len(found) == 1 else None


def odd_thing(scene: Scene) -> Thing | None:
    """Return the only thing of its category if all others, at least two, share another; None otherwise."""
    categories = Counter(thing.category for thing in scene)
    if len(scene) < 3 or sorted(categories.values()) != [1, len(scene) - 1]:
        return None
    return next(thing for thing in scene if categories[thing.category] == 1)


def at(place: str) -> str:
    """Return ``at the top left`` or ``in the middle``."""
    return f"{'in' if place == 'middle' else 'at'} the {place}"


def _unique(scene: Scene) -> list[Thing]:
    """Return the things that no other resembles: their name means one thing."""
    counts = Counter(thing.kind for thing in scene)
    return [thing for thing in scene if counts[thing.kind] == 1]


def _what_questions(scene: Scene) -> Options:
    questions = {f"What is {at(thing.place)}?": thing.kind for thing in scene}
    return questions | ({"What is it?": scene.things[0].kind} if len(scene) == 1 else {})


def _relation_questions(scene: Scene) -> Options:
    return {
        f"What is {relation} the {thing.kind}?": other.kind
        for thing in _unique(scene)
        for relation in RELATIONS
        if (other := neighbor(scene, thing, relation))
    }


def _count_questions(scene: Scene) -> Options:
    """Count things, categories, and kinds of the categories that are there."""
    kinds = Counter(thing.kind for thing in scene)
    categories = Counter(thing.category for thing in scene)
    counts = {"things": len(scene)}
    counts |= {plural: categories[category] for category, plural in CATEGORIES.items()}
    counts |= {kind.plural: kinds[name] for name, kind in THINGS.items() if kind.category in categories}
    return {f"How many {what} are there?": NUMBERS[count] for what, count in counts.items()}


def _presence_questions(scene: Scene) -> Options:
    """Ask for absent kinds of the categories that are there, and for a quarter of the others.

    All the others would outnumber the former. Which quarter it is depends on the scene.
    """
    present = {thing.kind for thing in scene}
    categories = {thing.category for thing in scene}
    names = list(THINGS)
    turn = names.index(scene.things[0].kind) % 4
    asked = [name for i, name in enumerate(names) if THINGS[name].category in categories or i % 4 == turn]
    return {f"Is there {THINGS[name].with_article}?": "yes" if name in present else "no" for name in asked}


def _category_questions(scene: Scene) -> Options:
    """Ask by place: a name would tell the category without the picture."""
    questions = {f"What kind of thing is {at(thing.place)}?": thing.category for thing in scene}
    return questions | ({"What kind of thing is it?": scene.things[0].category} if len(scene) == 1 else {})


def _background_questions(scene: Scene) -> Options:
    return {"What color is the background?": scene.background}


def _odd_questions(scene: Scene) -> Options:
    odd = odd_thing(scene)
    return dict.fromkeys(("Which thing does not belong?", "Which thing is of another kind?"), odd.kind) if odd else {}


def _where_questions(scene: Scene) -> Options:
    return {f"Where is the {thing.kind}?": thing.place for thing in _unique(scene)}


def _place_questions(scene: Scene) -> Options:
    kinds = {thing.cell: thing.kind for thing in scene}
    return {f"What is {at(place)}?": kinds.get(cell, "nothing") for cell, place in PLACES.items()}


KINDS: dict[str, Callable[[Scene], Options]] = {
    "what": _what_questions,
    "relation": _relation_questions,
    "count": _count_questions,
    "presence": _presence_questions,
    "category": _category_questions,
    "background": _background_questions,
    "odd": _odd_questions,
}
"""Questions of evaluation and training: kind -> (scene -> question -> answer)."""

LESSONS: dict[str, Callable[[Scene], Options]] = {
    "where": _where_questions,
    "place": _place_questions,
}
"""Additional questions of training."""
