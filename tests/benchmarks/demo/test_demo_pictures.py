"""Generated scenes and pictures of the demo: deterministic, with disjoint splits, everything in view."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_edge.benchmarks.demo import pictures, rendering
from fusion_edge.benchmarks.demo.arrangement import (
    CELL_SIZE,
    LEAST_DISTANCE,
    MAX_REPEATS,
    MAX_THINGS,
    NOT_MIRRORED,
    distance,
    held_out_pairs,
    shows_held_out_pair,
)
from fusion_edge.benchmarks.demo.atlas import image
from fusion_edge.benchmarks.demo.backgrounds import COLORS, TEXTURES
from fusion_edge.benchmarks.demo.pictures import BACKGROUNDS, GRID, PICTURE_SIZE, PLACES, SPLITS, THINGS, Scene, Thing
from fusion_edge.runtime.errors import UsageError

seeds = st.integers(0, 2**32)
splits = st.sampled_from(SPLITS)


def _arrangements(split: str, count: int) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [pictures.arrange(rng, split) for _ in range(count)]


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


def test_held_out_pairs_are_about_a_third_of_all_and_spread_evenly() -> None:
    pairs = held_out_pairs()
    assert all(len(pair) == 2 and pair <= THINGS.keys() for pair in pairs)
    assert 0.31 < len(pairs) / math.comb(len(THINGS), 2) < 0.34
    partners = Counter(name for pair in pairs for name in pair)
    assert partners.keys() == THINGS.keys()
    assert max(partners.values()) - min(partners.values()) <= 6
    within = Counter(name for pair in pairs for name in pair if len({THINGS[n].category for n in pair}) == 1)
    assert set(within.values()) == {2}


@settings(deadline=None, max_examples=60)
@given(seeds)
def test_training_shows_no_held_out_pair(seed: int) -> None:
    kinds = {thing.kind for thing in pictures.arrange(np.random.default_rng(seed))}
    assert all(frozenset(pair) not in held_out_pairs() for pair in itertools.combinations(kinds, 2))


@settings(deadline=None, max_examples=60)
@given(seeds)
def test_held_out_scenes_show_a_held_out_pair(seed: int) -> None:
    kinds = [thing.kind for thing in pictures.arrange(np.random.default_rng(seed), "held_out")]
    assert len(set(kinds)) == 1 or any(frozenset(pair) in held_out_pairs() for pair in itertools.combinations(kinds, 2))
    assert shows_held_out_pair(kinds) == (len(set(kinds)) > 1)


@settings(deadline=None, max_examples=60)
@given(seeds, splits)
def test_things_have_their_places(seed: int, split: str) -> None:
    scene = pictures.arrange(np.random.default_rng(seed), split)
    cells = [thing.cell for thing in scene]
    assert 1 <= len(scene) <= MAX_THINGS
    assert cells == sorted(set(cells))  # reading order, one in each
    assert scene.background in BACKGROUNDS
    assert max(Counter(thing.kind for thing in scene).values()) <= MAX_REPEATS
    for thing in scene:
        middle = [(index + 0.5) * CELL_SIZE for index in reversed(thing.cell)]
        assert max(abs(a - b) for a, b in zip(thing.center, middle, strict=True)) <= 21  # a sixth of a cell
        assert not (thing.mirrored and thing.kind in NOT_MIRRORED)
    for one, other in itertools.combinations(scene, 2):
        assert distance(one, other) >= LEAST_DISTANCE


MARGIN = 40
"""Pixels around the picture in a mask."""
INNER = slice(MARGIN, MARGIN + PICTURE_SIZE)


def _mask(thing: Thing) -> npt.NDArray[np.float32]:
    """Return how much of each pixel a thing covers: ``[464, 464]``, with the picture in the middle."""
    sprite = rendering._turn(image(thing.kind).getchannel("A"), thing)
    canvas = Image.new("L", (PICTURE_SIZE + 2 * MARGIN,) * 2)
    left, top = rendering._corner(thing)
    canvas.paste(sprite, (MARGIN + left, MARGIN + top))
    cover: npt.NDArray[np.float32] = np.asarray(canvas, np.float32) / np.float32(255)
    return cover


@pytest.mark.parametrize("split", SPLITS)
def test_things_are_in_the_picture_and_hide_little_of_each_other(split: str) -> None:
    for scene in _arrangements(split, 100):
        masks = [_mask(thing) for thing in scene]
        for mask in masks:
            outside = mask.sum() - mask[INNER, INNER].sum()
            assert outside < 0.5
            hidden = mask * np.max([np.zeros_like(mask), *(other for other in masks if other is not mask)], 0)
            assert hidden.sum() <= rendering.MAX_HIDDEN * mask.sum()


def test_a_mirrored_and_turned_thing_is_where_it_should_be() -> None:
    """The flame of the rocket is at its lower left; the mirror image's is at its lower right."""
    for mirrored, angle, side in [(False, 0.0, -1), (True, 0.0, 1), (False, 0.4, -1), (True, -0.4, 1)]:
        thing = Thing("rocket", (1, 1), (200.0, 180.0), 50.0, angle, mirrored)
        sprite = np.asarray(rendering._turn(image("rocket"), thing)).astype(float)
        flame = sprite[..., 3] * (sprite[..., 0] > 200) * (sprite[..., 1] > 150) * (sprite[..., 2] < 120)
        down, right = (np.average(np.arange(len(flame)), weights=flame.sum(axis)) for axis in (1, 0))
        assert down > len(flame) * 0.56
        assert side * (right - len(flame) / 2) > len(flame) * 0.05
    upright, turned = (Thing("rocket", (1, 1), (200.0, 180.0), 50.0, angle, False) for angle in (0.0, 0.4))
    tops = [np.argwhere(_mask(thing) > 0.9).min(0)[0] for thing in (upright, turned)]
    assert tops[0] < tops[1]  # turning clockwise takes the nose from the upper right down


def test_a_cut_hides_at_most_a_quarter() -> None:
    rng, hidden = np.random.default_rng(8), []
    for thing in itertools.chain(*_arrangements("train", 100)):
        sprite = rendering._turn(image(thing.kind), thing)
        before, after = (
            np.asarray(shown, float)[..., 3].sum() for shown in (sprite, rendering._cut(sprite, thing, rng))
        )
        hidden.append(1 - after / before)
    assert min(hidden) >= 0
    assert 0.2 < max(hidden) < rendering.MAX_HIDDEN + 0.005  # alpha rounds down
    assert np.mean(np.array(hidden) > 0.03) > 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_rgb_and_show_their_background(split: str) -> None:
    """The median color away from things is nearer to the background's than to any other."""
    shown = set()
    for scene, picture in itertools.islice(pictures.scenes(split, 0), 80):
        assert picture.shape == (PICTURE_SIZE, PICTURE_SIZE, 3)
        assert picture.dtype == np.uint8
        y, x = np.mgrid[:PICTURE_SIZE, :PICTURE_SIZE]
        free = np.all([np.hypot(x - t.center[0], y - t.center[1]) > 1.5 * t.radius for t in scene], 0)
        color = np.median(picture[free], 0)
        distances = {name: np.abs(color - mean).sum() for name, mean in COLORS.items()}
        assert min(distances, key=lambda name: distances[name]) == scene.background
        shown.add(scene.background)
    assert shown == set(BACKGROUNDS) == set(COLORS)


@pytest.mark.parametrize("split", SPLITS)
def test_things_are_visible(split: str) -> None:
    """Where a thing is, the picture differs from one without things, even of a frog on a green background."""
    for seed, scene in enumerate(_arrangements(split, 40)):
        picture = pictures.render(scene, np.random.default_rng(seed), split).astype(int)
        empty = pictures.render(Scene((), scene.background), np.random.default_rng(seed), split).astype(int)
        for thing in scene:
            covered = _mask(thing)[INNER, INNER] > 0.9
            differs = np.abs(picture - empty).sum(-1)[covered] > 45
            assert differs.mean() > 0.15, thing


def test_held_out_pictures_go_beyond_those_of_training() -> None:
    train, held_out = (list(itertools.chain(*_arrangements(split, 600))) for split in SPLITS)
    assert max(t.radius for t in held_out) > max(t.radius for t in train)
    assert min(t.radius for t in held_out) < min(t.radius for t in train)
    assert max(abs(t.angle) for t in held_out) > max(abs(t.angle) for t in train)
    assert set(TEXTURES["held_out"]) > set(TEXTURES["train"])


def test_places_have_different_names() -> None:
    assert len(set(PLACES.values())) == GRID**2
    assert (PLACES[0, 0], PLACES[0, 1], PLACES[1, 1], PLACES[2, 2]) == (
        "top left",
        "top middle",
        "middle",
        "bottom right",
    )


def test_all_kinds_and_cells_are_shown_about_equally_often() -> None:
    things = list(itertools.chain(*_arrangements("train", 4000)))
    kinds, cells = Counter(t.kind for t in things), Counter(t.cell for t in things)
    assert max(kinds.values()) < 2.2 * min(kinds.values())
    assert max(cells.values()) < 1.15 * min(cells.values())
