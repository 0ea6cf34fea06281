"""Generated pictures and questions with known answers, for training and evaluating the demo model.

A picture shows one to four colored shapes on a photo-like background (gradient, noise, vignette, lighting, shadows),
each in its own cell of a jittered 2 x 2 grid. Questions ask for a color, a shape, a count, a relative position or a
presence. No question is ambiguous, and the answers of each kind are balanced. Training adds lessons, which describe
what is where. A split and a seed determine everything; the splits share no random stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.runtime.errors import UsageError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PICTURE_SIZE = 256  # pixels; preprocessing enlarges it
GRID = 2  # cells per side, at most one shape in each
MAX_SHAPES = 4
SPLITS = ("train", "held_out")
PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
"""Name of each cell (row, column)."""
NUMBERS = ("zero", "one", "two", "three", "four")
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COLORS = {
    "red": (205, 35, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 205),
    "yellow": (235, 205, 45),
    "purple": (140, 50, 160),
    "white": (240, 240, 240),
}


@dataclass(frozen=True)
class Shape:
    """Colored shape; center (x, y) and radius in pixels, angle in radians."""

    kind: str
    color: str
    cell: tuple[int, int]
    """Row and column of the grid."""
    center: tuple[float, float]
    radius: float
    angle: float

    @property
    def name(self) -> str:
        """Name in questions, such as ``red circle``, unique within a picture."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Question:
    """Question about a picture, its only correct answer, and its kind (a key of :data:`KINDS` or :data:`LESSONS`)."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Example:
    """Question about an RGB picture ``[256, 256, 3]``."""

    picture: Pixels
    question: str
    answer: str
    kind: str


def examples(split: str, seed: int, questions_per_picture: int = 1) -> Iterator[Example]:
    """Yield examples without end, one per question of each picture.

    Raises :class:`UsageError` if ``split`` is not one of :data:`SPLITS`.
    """
    for number, (shapes, picture) in enumerate(scenes(split, seed)):
        rng = np.random.default_rng([SPLITS.index(split), seed, number])
        for question in ask(shapes, rng, questions_per_picture):
            yield Example(picture, question.text, question.answer, question.kind)


def scenes(split: str, seed: int) -> Iterator[tuple[list[Shape], Pixels]]:
    """Yield shapes and pictures without end. Raises :class:`UsageError` as :func:`examples` does."""
    if split not in SPLITS:
        raise UsageError(f"The split {split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    while True:
        shapes = arrange(rng)
        yield shapes, render(shapes, rng)


def arrange(rng: np.random.Generator) -> list[Shape]:
    """Return one to four shapes in reading order, with different names and cells."""
    count = int(rng.integers(1, MAX_SHAPES + 1))
    names = list(itertools.product(COLORS, SHAPES))
    cells = sorted(rng.choice(GRID * GRID, count, replace=False).tolist())
    cell_size = PICTURE_SIZE / GRID
    shapes = []
    for cell, name in zip(cells, rng.choice(len(names), count, replace=False), strict=True):
        color, kind = names[name]
        row, column = divmod(cell, GRID)
        radius = rng.uniform(0.21, 0.34) * cell_size
        jitter = rng.uniform(-1, 1, 2) * (0.47 * cell_size - radius)
        x, y = (column + 0.5) * cell_size + jitter[0], (row + 0.5) * cell_size + jitter[1]
        shapes.append(Shape(kind, color, (row, column), (x, y), radius, rng.uniform(-0.25, 0.25)))
    return shapes


def ask(shapes: list[Shape], rng: np.random.Generator, count: int, lessons: bool = False) -> list[Question]:
    """Return ``count`` different questions about the shapes, with kinds drawn evenly from those that apply.

    ``lessons`` adds the kinds of :data:`LESSONS`.
    """
    asked: dict[str, Question] = {}
    choices = KINDS | LESSONS if lessons else KINDS
    kinds = list(choices)
    while len(asked) < count:
        kind = kinds[rng.integers(len(kinds))]
        options = choices[kind](shapes)
        if not options:
            continue
        # Drawing the answer before the question balances the answers.
        answers = sorted(set(options.values()))
        answer = answers[rng.integers(len(answers))]
        texts = [text for text, value in options.items() if value == answer]
        text = texts[rng.integers(len(texts))]
        asked[text] = Question(text, answer, kind)
    return list(asked.values())


def _color_questions(shapes: list[Shape]) -> dict[str, str]:
    kinds = [shape.kind for shape in shapes]
    return {f"What color is the {s.kind}?": s.color for s in shapes if kinds.count(s.kind) == 1}


def _shape_questions(shapes: list[Shape]) -> dict[str, str]:
    colors = [shape.color for shape in shapes]
    return {f"What shape is {s.color}?": s.kind for s in shapes if colors.count(s.color) == 1}


def _count_questions(shapes: list[Shape]) -> dict[str, str]:
    counts = {"shapes": len(shapes)}
    counts |= {plural: sum(s.kind == kind for s in shapes) for kind, plural in SHAPES.items()}
    counts |= {f"{color} shapes": sum(s.color == color for s in shapes) for color in COLORS}
    return {f"How many {what} are there?": NUMBERS[count] for what, count in counts.items()}


def _position_questions(shapes: list[Shape]) -> dict[str, str]:
    """Compare only shapes in different columns (or rows): within one, they differ by jitter only."""
    questions = {}
    for first, second in itertools.permutations(shapes, 2):
        for axis, relation in enumerate(("above", "left of")):
            if first.cell[axis] != second.cell[axis]:
                before = first.cell[axis] < second.cell[axis]
                questions[f"Is the {first.name} {relation} the {second.name}?"] = "yes" if before else "no"
    return questions


def _presence_questions(shapes: list[Shape]) -> dict[str, str]:
    """Use absent names that share a color or a kind with the picture, so that neither gives the answer away."""
    present = {shape.name for shape in shapes}
    colors, kinds = {s.color for s in shapes}, {s.kind for s in shapes}
    absent = {f"{c} {k}" for c in COLORS for k in SHAPES if c in colors or k in kinds} - present
    answers = dict.fromkeys(sorted(present), "yes") | dict.fromkeys(sorted(absent), "no")
    return {f"Is there a {name}?": answer for name, answer in answers.items()}


def _where_questions(shapes: list[Shape]) -> dict[str, str]:
    return {f"Where is the {shape.name}?": PLACES[shape.cell] for shape in shapes}


def _kind_questions(shapes: list[Shape]) -> dict[str, str]:
    """Ask for shapes by kind only, because colors suffice for most other questions."""
    kinds = [shape.kind for shape in shapes]
    questions = {f"Where is the {s.kind}?": PLACES[s.cell] for s in shapes if kinds.count(s.kind) == 1}
    return questions | {f"Is there a {kind}?": "yes" if kind in kinds else "no" for kind in SHAPES}


def _place_questions(shapes: list[Shape]) -> dict[str, str]:
    names = {shape.cell: shape.name for shape in shapes}
    return {f"What is at the {place}?": names.get(cell, "nothing") for cell, place in PLACES.items()}


def _description(shapes: list[Shape]) -> dict[str, str]:
    return {"Describe the picture.": ", ".join(f"{shape.name} {PLACES[shape.cell]}" for shape in shapes)}


KINDS: dict[str, Callable[[list[Shape]], dict[str, str]]] = {
    "color": _color_questions,
    "shape": _shape_questions,
    "count": _count_questions,
    "position": _position_questions,
    "presence": _presence_questions,
}
"""Questions of evaluation and training: kind -> (shapes -> question -> answer)."""

LESSONS: dict[str, Callable[[list[Shape]], dict[str, str]]] = {
    "where": _where_questions,
    "kind": _kind_questions,
    "place": _place_questions,
    "description": _description,
}
"""Additional questions of training. Answers of one word teach little about how shape, color and place belong together;
without lessons the model answers relative positions at chance."""


def render(shapes: list[Shape], rng: np.random.Generator) -> Pixels:
    """Draw the shapes with shadows and shading on a new background: ``[256, 256, 3]`` RGB."""
    canvas = _background(rng)
    light = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.cos(light), np.sin(light)], np.float32)
    for shape in shapes:
        _draw(canvas, shape, direction, rng)
    exposure = rng.uniform(0.85, 1.08) * rng.uniform(0.96, 1.04, 3)
    canvas *= exposure.astype(np.float32)
    canvas += rng.normal(0, rng.uniform(1, 5), (PICTURE_SIZE, PICTURE_SIZE, 1)).astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator) -> Floats:
    """Return a dull color with a gradient, blotches and a vignette: ``[256, 256, 3]``."""
    y, x = np.mgrid[-1 : 1 : PICTURE_SIZE * 1j, -1 : 1 : PICTURE_SIZE * 1j].astype(np.float32)
    color = rng.uniform(60, 125) + rng.uniform(-14, 14, 3).astype(np.float32)
    slope = rng.uniform(-22, 22, 2)
    blotches = Image.fromarray(rng.normal(0, 9, (7, 7)).astype(np.float32))
    blotches = blotches.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
    brightness = slope[0] * x + slope[1] * y + np.asarray(blotches)
    brightness -= rng.uniform(0, 18) * (x * x + y * y)
    background: Floats = (color + brightness[..., None]).astype(np.float32)
    return background


def _draw(canvas: Floats, shape: Shape, light: Floats, rng: np.random.Generator) -> None:
    """Blend a shape and its shadow into the canvas."""
    reach = int(shape.radius * 1.45) + 8
    (x, y), size = shape.center, PICTURE_SIZE
    left, right = max(0, int(x) - reach), min(size, int(x) + reach)
    top, bottom = max(0, int(y) - reach), min(size, int(y) + reach)
    down, across = np.mgrid[top:bottom, left:right].astype(np.float32)
    across, down = across - np.float32(x), down - np.float32(y)
    region = canvas[top:bottom, left:right]

    shadow_x, shadow_y = 5 * light
    shade = np.clip(0.5 - _distance(shape, across - shadow_x, down - shadow_y) / 8, 0, 1)
    region *= 1 - 0.3 * shade[..., None]

    cover = np.clip(0.5 - _distance(shape, across, down), 0, 1)[..., None]
    color = np.array(COLORS[shape.color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    shading = 1 - 0.12 * (across * light[0] + down * light[1]) / np.float32(shape.radius)
    region += cover * (color * shading[..., None] - region)


def _distance(shape: Shape, across: Floats, down: Floats) -> Floats:
    """Return the signed distance from the outline in pixels: negative inside, approximate outside corners."""
    cosine, sine = np.float32(np.cos(shape.angle)), np.float32(np.sin(shape.angle))
    x, y = across * cosine + down * sine, down * cosine - across * sine
    radius = np.float32(shape.radius)
    distance: Floats
    if shape.kind == "circle":
        distance = np.hypot(x, y) - radius
    elif shape.kind == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - np.float32(0.85) * radius
    elif shape.kind == "triangle":
        slanted = np.float32(np.sqrt(0.75)) * np.abs(x) - np.float32(0.5) * y
        distance = np.maximum(slanted, y) - np.float32(0.55) * radius
    else:
        bar, length = np.float32(0.3) * radius, np.float32(0.98) * radius
        upright = np.maximum(np.abs(x) - bar, np.abs(y) - length)
        distance = np.minimum(upright, np.maximum(np.abs(y) - bar, np.abs(x) - length))
    return distance
