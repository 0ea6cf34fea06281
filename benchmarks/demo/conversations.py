"""Conversations about the demo's scenes: later questions say "it" for the thing of an earlier answer."""

from __future__ import annotations

import numpy as np

from fusion_edge.benchmarks.demo.arrangement import Scene, Thing
from fusion_edge.benchmarks.demo.questions import RELATIONS, Question, ask, at, neighbor, odd_thing

_PLAIN = ("count", "presence", "background")
"""Kinds of questions without "it", whose answers name no thing."""


def conversation(scene: Scene, rng: np.random.Generator, turns: int) -> list[Question]:
    """Return ``turns`` different questions, to be asked in this order.

    The first has a thing as its answer; "it" is the thing that was an answer last. No answer is a thing or a place that
    the conversation named. What was named may be counted, or asked for with "Is there".
    """
    first, it = _open(scene, rng)
    questions, seen = [first], [it]
    while len(questions) < turns:
        texts = {question.text for question in questions}
        follows = [(q, thing) for q, thing in _follow(scene, it, seen) if q.text not in texts]
        if " the " not in first.text and "Where is it?" not in texts and it is seen[0]:
            follows.append((Question("Where is it?", it.place, "where"), it))
        if follows:
            question, it = follows[rng.integers(len(follows))]
            questions.append(question)
            seen.append(it)
        else:
            plain = [q for q in ask(scene, rng, len(questions) + 3) if q.kind in _PLAIN and q.text not in texts]
            questions += plain[:1]
    return questions


def _open(scene: Scene, rng: np.random.Generator) -> tuple[Question, Thing]:
    """Return a question for one thing, and the thing."""
    thing = scene.things[rng.integers(len(scene))]
    if len(scene) == 1:
        return Question("What is it?", thing.kind, "what"), thing
    odd = odd_thing(scene)
    if odd is not None and rng.random() < 0.3:
        return Question("Which thing does not belong?", odd.kind, "odd"), odd
    return Question(f"What is {at(thing.place)}?", thing.kind, "what"), thing


def _follow(scene: Scene, it: Thing, seen: list[Thing]) -> list[tuple[Question, Thing]]:
    """Return questions about "it", and the thing that "it" is after each."""
    follows = [(Question("What kind of thing is it?", it.category, "category"), it)]
    for relation in RELATIONS:
        other = neighbor(scene, it, relation)
        if other is not None and other not in seen:
            follows.append((Question(f"What is {relation} it?", other.kind, "relation"), other))
    return follows
