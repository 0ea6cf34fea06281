"""Generated pictures of the demo: deterministic, unambiguous, balanced, with disjoint splits."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.pictures import COLORS, GRID, KINDS, LESSONS, NUMBERS, PICTURE_SIZE, SHAPES, Shape
from fusion_edge.runtime.errors import UsageError


def _arrangements(count: int) -> list[list[Shape]]:
    rng = np.random.default_rng(7)
    return [pictures.arrange(rng) for _ in range(count)]


def test_same_seed_gives_the_same_examples() -> None:
    first, second = (list(itertools.islice(pictures.examples("train", 3, 4), 12)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert (one.question, one.answer, one.kind) == (other.question, other.answer, other.kind)
        np.testing.assert_array_equal(one.picture, other.picture)


def test_splits_and_seeds_give_different_pictures() -> None:
    streams = [("train", 0), ("held_out", 0), ("train", 1), ("held_out", 1)]
    rendered = {
        picture.tobytes() for split, seed in streams for _, picture in itertools.islice(pictures.scenes(split, seed), 5)
    }
    assert len(rendered) == 5 * len(streams)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'test'.*train, held_out"):
        next(pictures.examples("test", 0))


def test_pictures_are_rgb_and_shapes_are_visible() -> None:
    for shapes, picture in itertools.islice(pictures.scenes("train", 0), 40):
        assert picture.shape == (PICTURE_SIZE, PICTURE_SIZE, 3)
        assert picture.dtype == np.uint8
        for shape in shapes:
            x, y = (int(coordinate) for coordinate in shape.center)
            middle = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
            distances = {name: np.abs(middle - color).sum() for name, color in COLORS.items()}
            assert min(distances, key=lambda name: distances[name]) == shape.color


def test_shapes_keep_to_their_cells() -> None:
    cell = PICTURE_SIZE / GRID
    for shapes in _arrangements(300):
        assert len({shape.cell for shape in shapes}) == len(shapes)
        assert len({shape.name for shape in shapes}) == len(shapes)
        for shape in shapes:
            for center, place in zip(shape.center, reversed(shape.cell), strict=True):
                assert place * cell <= center - shape.radius
                assert center + shape.radius <= (place + 1) * cell


def test_questions_have_one_right_answer() -> None:
    """Every answer follows from the question's words and the shapes' places."""
    for shapes in _arrangements(200):
        by_name = {shape.name: shape for shape in shapes}
        for kind, options in (KINDS | LESSONS).items():
            for text, answer in options(shapes).items():
                assert answer == _answer(kind, text, shapes, by_name), text


def _answer(kind: str, text: str, shapes: list[Shape], by_name: dict[str, Shape]) -> str:
    words = re.findall(r"\w+", text)
    if kind in ("color", "shape"):
        [match] = [shape for shape in shapes if words[-1] in shape.name.split()]
        return match.color if kind == "color" else match.kind
    if kind == "count":
        singular = {plural: shape for shape, plural in SHAPES.items()}
        asked = {singular.get(word, word) for word in words[2:-2]} - {"shapes"}
        return NUMBERS[sum(asked <= set(shape.name.split()) for shape in shapes)]
    if kind == "position":
        first, second = by_name[" ".join(words[2:4])], by_name[" ".join(words[-2:])]
        axis = 0 if "left" in words else 1
        return "yes" if first.center[axis] < second.center[axis] else "no"
    if kind == "presence":
        return "yes" if " ".join(words[-2:]) in by_name else "no"
    if kind in ("where", "kind"):
        matches = [shape for shape in shapes if set(words[3:]) <= set(shape.name.split())]
        return _place(matches[0]) if words[0] == "Where" else "yes" if matches else "no"
    if kind == "place":
        return next((shape.name for shape in shapes if text == f"What is at the {_place(shape)}?"), "nothing")
    assert (kind, text) == ("description", "Describe the picture.")
    ordered = sorted(shapes, key=lambda shape: [center > PICTURE_SIZE / 2 for center in reversed(shape.center)])
    return ", ".join(f"{shape.name} {_place(shape)}" for shape in ordered)


def _place(shape: Shape) -> str:
    x, y = shape.center
    return f"{'top' if y < PICTURE_SIZE / 2 else 'bottom'} {'left' if x < PICTURE_SIZE / 2 else 'right'}"


def test_compared_shapes_are_well_apart() -> None:
    """Relations are asked only of shapes that jitter cannot align."""
    for shapes in _arrangements(200):
        by_name = {shape.name: shape for shape in shapes}
        for text in KINDS["position"](shapes):
            words = re.findall(r"\w+", text)
            first, second = by_name[" ".join(words[2:4])], by_name[" ".join(words[-2:])]
            axis = 0 if "left" in words else 1
            assert abs(first.center[axis] - second.center[axis]) >= first.radius + second.radius


def test_questions_about_a_picture_differ() -> None:
    rng = np.random.default_rng(0)
    for shapes in _arrangements(50):
        asked = pictures.ask(shapes, rng, 5)
        assert len({question.text for question in asked}) == 5
        assert all(KINDS[question.kind](shapes)[question.text] == question.answer for question in asked)


@pytest.mark.parametrize("kind", ["color", "shape", "position", "presence"])
def test_answers_are_balanced(kind: str) -> None:
    rng = np.random.default_rng(1)
    asked = [question for shapes in _arrangements(2000) for question in pictures.ask(shapes, rng, 2)]
    answers = Counter(question.answer for question in asked if question.kind == kind)
    even = sum(answers.values()) / len(answers)
    assert all(0.75 * even < count < 1.25 * even for count in answers.values()), answers
