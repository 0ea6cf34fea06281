"""Which things a scene of the demo shows, and where.

A scene has one to six things in different cells of a jittered 3 x 3 grid. About a third of all pairs of kinds is
held out: no training scene shows such a pair, and each held-out scene of two or more kinds shows one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.demo.atlas import CATEGORIES, KINDS

PICTURE_SIZE = 384  # pixels
GRID = 3  # cells per side, at most one thing in each
CELL_SIZE = PICTURE_SIZE / GRID
MAX_THINGS = 6
MAX_REPEATS = 4  # things of one kind
SPLITS = ("train", "held_out")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
PLACES = {(r, c): f"{_ROWS[r]} {_COLUMNS[c]}" for r in range(GRID) for c in range(GRID)} | {(1, 1): "middle"}
"""Name of each cell (row, column)."""
BACKGROUNDS = ("red", "green", "blue", "yellow", "purple", "white", "gray", "brown")
"""Color of a background."""
NOT_MIRRORED = frozenset({"clock", "piano", "phone", "hospital"})
MAX_SHIFT = 20.0  # pixels from the middle of a cell, unless the thing would leave the picture
_RADIUS = {"train": (28.0, 57.0), "held_out": (25.0, 59.0)}
_ANGLE = {"train": np.deg2rad(25), "held_out": np.deg2rad(30)}
LEAST_DISTANCE = 0.86
"""Of two things, see :func:`distance`: neighbors hide little of each other."""


@dataclass(frozen=True)
class Thing:
    """Thing in a picture; center (x, y) and radius (half the size) in pixels, angle in radians, clockwise."""

    kind: str
    """A key of :data:`~fusion_edge.benchmarks.demo.atlas.KINDS`."""
    cell: tuple[int, int]
    """Row and column of the grid."""
    center: tuple[float, float]
    radius: float
    angle: float
    mirrored: bool

    @property
    def category(self) -> str:
        """A key of :data:`~fusion_edge.benchmarks.demo.atlas.CATEGORIES`."""
        return KINDS[self.kind].category

    @property
    def place(self) -> str:
        """Name of the cell."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """One to six things in reading order, on a background whose color has a name."""

    things: tuple[Thing, ...]
    background: str
    """One of :data:`BACKGROUNDS`."""

    def __iter__(self) -> Iterator[Thing]:
        return iter(self.things)

    def __len__(self) -> int:
        return len(self.things)


def distance(thing: Thing, other: Thing) -> float:
    """Return the distance of the centers as a part of the sum of the radii."""
    return math.dist(thing.center, other.center) / (thing.radius + other.radius)


def arrange(rng: np.random.Generator, split: str = "train") -> Scene:
    """Return a random scene of a split, one of :data:`SPLITS`."""
    kinds = _draw_kinds(rng, split)
    cells = sorted(rng.choice(GRID * GRID, len(kinds), replace=False).tolist())
    while (things := _place(kinds, [divmod(cell, GRID) for cell in cells], rng, split)) is None:
        pass
    return Scene(things, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


@cache
def held_out_pairs() -> frozenset[frozenset[str]]:
    """Return the pairs of kinds that training never shows together.

    Each kind has about as many as any other, so that training shows all kinds equally often: two partners of its
    category, its neighbors in a random circle, and a third of each other category.
    """
    rng = np.random.default_rng(96)
    groups = [rng.permutation([k.name for k in KINDS.values() if k.category == c]).tolist() for c in CATEGORIES]
    pairs = {frozenset(pair) for names in groups for pair in zip(names, [*names[1:], names[0]], strict=True)}
    for first, second in itertools.combinations(groups, 2):
        places = rng.permutation(len(first)).tolist(), rng.permutation(len(second)).tolist()
        rows, columns = zip(first, places[0], strict=True), list(zip(second, places[1], strict=True))
        pairs |= {frozenset((one, other)) for one, i in rows for other, j in columns if (i + j) % 3 == 0}
    return frozenset(pairs)


def shows_held_out_pair(kinds: Sequence[str]) -> bool:
    """Tell whether two of the kinds are a held-out pair."""
    return any(frozenset(pair) in held_out_pairs() for pair in itertools.combinations(set(kinds), 2))


@cache
def _compatible() -> npt.NDArray[np.bool_]:
    """Return whether training may show kinds i and j together: ``[96, 96]``, in the order of ``KINDS``."""
    names = list(KINDS)
    allowed = ~np.eye(len(names), dtype=bool)
    for first, second in map(sorted, held_out_pairs()):
        i, j = names.index(first), names.index(second)
        allowed[i, j] = allowed[j, i] = False
    return allowed


@cache
def _members() -> dict[str, npt.NDArray[np.bool_]]:
    """Return which kinds belong to a category: ``[96]``, in the order of ``KINDS``."""
    return {category: np.array([kind.category == category for kind in KINDS.values()]) for category in CATEGORIES}


def _draw_kinds(rng: np.random.Generator, split: str) -> list[str]:
    """Return the kinds of a scene in random order, one for each thing."""
    count = int(rng.integers(1, MAX_THINGS + 1))
    while True:
        kinds = _fill(_draw_slots(count, rng), rng, split)
        if kinds and (split == "train" or len(set(kinds)) == 1 or shows_held_out_pair(kinds)):
            rng.shuffle(kinds)
            return kinds


def _draw_slots(count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Return categories and how many things of one kind of it to show, ``count`` things together."""
    categories = rng.permutation(list(CATEGORIES)).tolist()
    composition = rng.random()
    if count > 2 and composition < 0.35:  # all but one of the same category
        repeats = int(rng.integers(2, min(count, MAX_REPEATS + 1))) if rng.random() < 0.3 else 1
        same = [(categories[0], repeats), *[(categories[0], 1)] * (count - 1 - repeats)]
        return [*same, (categories[1], 1)]
    mixed = categories[: rng.integers(1, 4)]
    if count > 1 and composition < 0.65:  # several of one kind
        repeats = int(rng.integers(2, min(count, MAX_REPEATS) + 1))
        return [(mixed[0], repeats), *((mixed[rng.integers(len(mixed))], 1) for _ in range(count - repeats))]
    return [(mixed[rng.integers(len(mixed))], 1) for _ in range(count)]


def _fill(slots: list[tuple[str, int]], rng: np.random.Generator, split: str) -> list[str]:
    """Draw a kind for each slot; return no kinds if training cannot show any with those drawn before."""
    names = list(KINDS)
    free = np.ones(len(names), bool)
    kinds: list[str] = []
    for category, repeats in slots:
        options = np.flatnonzero(free & _members()[category])
        if len(options) == 0:
            return []
        chosen = int(rng.choice(options))
        kinds += [names[chosen]] * repeats
        free[chosen] = False
        if split == "train":
            free &= _compatible()[chosen]
    return kinds


def _place(
    kinds: list[str], cells: list[tuple[int, int]], rng: np.random.Generator, split: str
) -> tuple[Thing, ...] | None:
    """Return things of random sizes inside the picture, or None if two of them overlap too much."""
    things: list[Thing] = []
    for kind, (row, column) in zip(kinds, cells, strict=True):
        radius = rng.uniform(*_RADIUS[split])
        angle = rng.uniform(-1, 1) * _ANGLE[split]
        margin = radius * (np.cos(angle) + abs(np.sin(angle)))  # half of the rotated image's side
        x, y = (
            float(np.clip((index + 0.5) * CELL_SIZE + rng.uniform(-1, 1) * MAX_SHIFT, margin, PICTURE_SIZE - margin))
            for index in (column, row)
        )
        mirrored = kind not in NOT_MIRRORED and bool(rng.random() < 0.5)
        thing = Thing(kind, (row, column), (x, y), float(radius), float(angle), mirrored)
        if any(distance(thing, other) < LEAST_DISTANCE for other in things):
            return None
        things.append(thing)
    return tuple(things)
