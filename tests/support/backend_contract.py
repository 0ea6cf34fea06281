"""The contract of every backend (``runtime/backends/base.py``), as tests of a fixture ``subject``."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fusion_edge.runtime import FusionError
from fusion_edge.runtime.backends.base import Backend, Floats, ImageAlignment, Integers, KvPrefix
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.images.grids import alignment_cells

LENGTH, CAPACITY = 60, 64  # of the prompts in these tests
HALF = 0.02
"""Tolerance of float16, in standard deviations."""
PREFIX = 60  # tokens: as an image, more than most prompts, so an int8 cache has scales for what follows


@dataclass(frozen=True)
class Subject:
    """A backend, its manifest, and its tolerance."""

    backend: Backend
    manifest: Manifest
    tolerance: float
    """Maximum difference in standard deviations between equal results of different kernels."""

    @property
    def width(self) -> int:
        return self.manifest.model.language.hidden_size

    def encode(self, crops: int, words: int) -> npt.ArrayLike:
        """Return features of random crops and texts. More crops or words do not change the first ones."""
        pixels = _random(1, GLOBAL_CROPS, 3, IMAGE_SIZE, IMAGE_SIZE)[:crops]
        text = _random(2, GLOBAL_CROPS, 8, self.width)[:crops, :words]
        return self.backend.encode(pixels, text, np.ones((crops, words), np.bool_))

    def align(self, features: object, length: int) -> ImageAlignment:
        """Return the alignment for a query length."""
        config = self.manifest.model
        cells = alignment_cells(2 * config.vision.grid, length, config.alignment.window_size)
        return self.backend.align(features, *cells)

    def image(self) -> ImageAlignment:
        """Return the alignment for the shortest query length."""
        return self.align(self.encode(GLOBAL_CROPS, 0), min(self.manifest.query_lengths))

    def prompt(self, image: ImageAlignment, questions: int) -> tuple[Floats, Integers, Integers]:
        """Return rows, the positions of each question's latents, and the positions of the questions."""
        rows, count = _random(3, LENGTH, self.width), len(image.latents)
        latent_positions = 4 + 24 * np.arange(questions)[:, None] + np.arange(count)
        rows[latent_positions] = image.latents
        return rows, latent_positions, latent_positions[:, -1] + 5

    def prefix(self, seed: int = 7) -> tuple[Floats, KvPrefix]:
        """Return the rows of a prefix, and the prefix."""
        rows = _random(seed, PREFIX, self.width)
        return rows, self.backend.prefill_prefix(rows)

    def start(self, capacity: int = CAPACITY) -> Floats:
        """Start a sequence of one question, and return its rows."""
        image = self.image()
        rows, latents, questions = self.prompt(image, 1)
        self.backend.prefill(rows, image, latents, questions, capacity)
        return rows

    def assert_close(self, actual: npt.ArrayLike, expected: npt.ArrayLike) -> None:
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= self.tolerance * expected.std()


def _random(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def assert_floats(array: npt.NDArray[Any], *shape: int) -> None:
    assert array.dtype == np.float32
    assert array.shape == shape
    assert np.isfinite(array).all()
    assert array.std() > 0


class BackendContract:
    """Base class for test files with a fixture ``subject``."""

    @pytest.mark.parametrize("crops", [1, GLOBAL_CROPS])
    @pytest.mark.parametrize("words", [0, 1, 7])
    def test_features(self, subject: Subject, crops: int, words: int) -> None:
        patches = subject.manifest.model.vision.patches
        assert_floats(np.asarray(subject.encode(crops, words)), crops, patches, subject.width)

    def test_crops_are_encoded_independently(self, subject: Subject) -> None:
        together = np.asarray(subject.encode(GLOBAL_CROPS, 3))
        subject.assert_close(np.asarray(subject.encode(1, 3))[0], together[0])
        assert not np.array_equal(together[0], together[1])

    def test_words_change_features(self, subject: Subject) -> None:
        assert not np.array_equal(np.asarray(subject.encode(1, 0)), np.asarray(subject.encode(1, 7)))

    def test_features_stay_valid(self, subject: Subject) -> None:
        """The next run does not overwrite the features of an image."""
        first = subject.encode(GLOBAL_CROPS, 0)
        before = np.array(first)
        subject.encode(GLOBAL_CROPS, 7)
        assert np.array_equal(np.asarray(first), before)

    def test_latents_of_every_length(self, subject: Subject) -> None:
        features = subject.encode(GLOBAL_CROPS, 0)
        for length in subject.manifest.query_lengths:
            assert_floats(subject.align(features, length).latents, length, subject.width)

    def test_alignment_accepts_features_on_the_host(self, subject: Subject) -> None:
        length = min(subject.manifest.query_lengths)
        features = subject.encode(GLOBAL_CROPS, 0)
        latents = subject.align(features, length).latents
        assert np.array_equal(subject.align(np.asarray(features), length).latents, latents)

    def test_alignments_stay_valid(self, subject: Subject) -> None:
        """The alignment of an image is valid after the alignment of another."""
        image = subject.image()
        prompt = subject.prompt(image, 1)
        first = _prefill(subject, image, prompt)
        subject.align(np.asarray(subject.encode(GLOBAL_CROPS, 7)), len(image.latents))
        assert np.array_equal(_prefill(subject, image, prompt), first)

    @pytest.mark.parametrize("questions", [1, 2])
    def test_logits(self, subject: Subject, questions: int) -> None:
        image = subject.image()
        vocabulary = subject.manifest.model.language.vocab_size
        assert_floats(_prefill(subject, image, subject.prompt(image, questions)), vocabulary)
        assert_floats(subject.backend.decode(_random(4, subject.width)), vocabulary)

    def test_every_question_has_its_latents(self, subject: Subject) -> None:
        """Questions may come in any order, and have their own latents."""
        image = subject.image()
        rows, latents, questions = subject.prompt(image, 2)
        expected = _prefill(subject, image, (rows, latents, questions))
        swapped = latents[::-1].copy(), questions[::-1].copy()
        subject.assert_close(_prefill(subject, image, (rows, *swapped)), expected)
        assert not np.array_equal(_prefill(subject, image, (rows, latents, swapped[1])), expected)

    def test_decode_steps_equal_a_longer_prompt(self, subject: Subject) -> None:
        image = subject.image()
        rows, latents, questions = subject.prompt(image, 2)
        _prefill(subject, image, (rows[:-3], latents, questions))
        for count in (2, 1, 0):
            stepped = subject.backend.decode(rows[LENGTH - 1 - count]).copy()
        subject.assert_close(stepped, _prefill(subject, image, (rows, latents, questions)))

    def test_every_sequence_starts_anew(self, subject: Subject) -> None:
        image = subject.image()
        prompt = subject.prompt(image, 1)
        after = _random(5, 3, subject.width)
        runs = []
        for _ in range(2):
            first = _prefill(subject, image, prompt)
            runs.append([first, *(subject.backend.decode(row).copy() for row in after)])
            _prefill(subject, image, subject.prompt(image, 2), capacity=subject.backend.max_context)
        assert np.array_equal(runs[0], runs[1])
        assert not np.array_equal(runs[0][0], runs[0][1])

    def test_a_sequence_ends_at_its_capacity(self, subject: Subject) -> None:
        image = subject.image()
        prompt = subject.prompt(image, 1)
        _prefill(subject, image, prompt)
        row = _random(6, subject.width)
        for _ in range(CAPACITY - LENGTH):
            subject.backend.decode(row)
        with pytest.raises(FusionError, match=f"{CAPACITY + 1} tokens, more than its capacity of {CAPACITY}"):
            subject.backend.decode(row)

    def test_a_prompt_fits_its_capacity(self, subject: Subject) -> None:
        image = subject.image()
        prompt = subject.prompt(image, 1)
        full = _prefill(subject, image, prompt, capacity=LENGTH)
        subject.assert_close(full, _prefill(subject, image, prompt))
        with pytest.raises(FusionError, match=f"{LENGTH} tokens, more than its capacity of {LENGTH - 1}"):
            _prefill(subject, image, prompt, capacity=LENGTH - 1)

    @pytest.mark.parametrize("questions", [1, 2])
    def test_a_prompt_behind_a_prefix_equals_the_whole_prompt(self, subject: Subject, questions: int) -> None:
        image = subject.image()
        rows, latents, asked = subject.prompt(image, questions)
        before, prefix = subject.prefix()
        assert prefix.length == PREFIX
        logits = _behind(subject, prefix, image, (rows, latents, asked))
        stepped = subject.backend.decode(before[0]).copy()
        whole = np.concatenate([before, rows]), latents + PREFIX, asked + PREFIX
        subject.assert_close(logits, _prefill(subject, image, whole, PREFIX + CAPACITY))
        subject.assert_close(stepped, subject.backend.decode(before[0]))

    def test_prefixes_stay_valid(self, subject: Subject) -> None:
        """Neither sequences behind a prefix, nor other ones, nor other prefixes change it."""
        image = subject.image()
        prompt = subject.prompt(image, 1)
        prefixes = [subject.prefix(seed)[1] for seed in (7, 8)]
        rows = _random(5, 2, subject.width)
        runs: list[list[Floats]] = []
        for prefix in (*prefixes, *prefixes, prefixes[1], prefixes[0]):
            runs.append(
                [_behind(subject, prefix, image, prompt), *(subject.backend.decode(row).copy() for row in rows)]
            )
            _behind(subject, prefix, image, subject.prompt(image, 2), subject.backend.max_context)
            if prefix is prefixes[1]:
                _prefill(subject, image, subject.prompt(image, 2))
        first, second = runs[:2]
        assert not np.array_equal(first[0], second[0])
        for run, expected in zip(runs, (first, second, first, second, second, first), strict=True):
            assert np.array_equal(run, expected)

    def test_a_sequence_outlives_its_prefix(self, subject: Subject) -> None:
        """The memory of a prefix is free when the sequence behind it has ended, too."""
        image, row = subject.image(), _random(5, subject.width)
        prompt = subject.prompt(image, 1)
        _, prefix = subject.prefix()
        _behind(subject, prefix, image, prompt)
        expected = subject.backend.decode(row).copy()
        _behind(subject, prefix, image, prompt)
        del prefix
        gc.collect()
        assert np.array_equal(subject.backend.decode(row), expected)

    def test_a_new_prefix_ends_the_sequence(self, subject: Subject) -> None:
        image = subject.image()
        _prefill(subject, image, subject.prompt(image, 1))
        subject.prefix()
        with pytest.raises(FusionError, match="1 tokens, more than its capacity of 0"):
            subject.backend.decode(_random(5, subject.width))

    def test_the_prefix_counts_in_the_capacity(self, subject: Subject) -> None:
        image, row = subject.image(), _random(6, subject.width)
        prompt = subject.prompt(image, 1)
        _, prefix = subject.prefix()
        with pytest.raises(FusionError, match=f"{PREFIX + LENGTH} tokens, more than its capacity of {LENGTH}"):
            _behind(subject, prefix, image, prompt, LENGTH)
        _behind(subject, prefix, image, prompt, PREFIX + LENGTH + 1)
        subject.backend.decode(row)
        with pytest.raises(FusionError, match=f"{PREFIX + LENGTH + 2} tokens, more than its capacity"):
            subject.backend.decode(row)

    @pytest.mark.parametrize("has_prefix", [False, True])
    def test_a_rewound_sequence_continues_as_if_new(self, subject: Subject, has_prefix: bool) -> None:
        image, rows = subject.image(), _random(5, 4, subject.width)
        prompt = subject.prompt(image, 1)
        prefix = subject.prefix()[1] if has_prefix else None
        before = 0 if prefix is None else prefix.length
        _behind(subject, prefix, image, prompt)
        expected = [subject.backend.decode(row).copy() for row in rows]
        _behind(subject, prefix, image, prompt)
        for row in rows[::-1]:
            subject.backend.decode(row)
        subject.backend.rewind(before + LENGTH)
        assert np.array_equal([subject.backend.decode(row).copy() for row in rows], expected)
        subject.backend.rewind(before + LENGTH + 2)
        assert np.array_equal([subject.backend.decode(row).copy() for row in rows[2:]], expected[2:])

    @pytest.mark.parametrize("has_prefix", [False, True])
    def test_a_sequence_does_not_rewind_further_than_its_prefix(self, subject: Subject, has_prefix: bool) -> None:
        image = subject.image()
        prefix = subject.prefix()[1] if has_prefix else None
        first, last = (PREFIX, PREFIX + LENGTH) if has_prefix else (1, LENGTH)
        _behind(subject, prefix, image, subject.prompt(image, 1))
        for length in (first - 1, last + 1):
            with pytest.raises(FusionError, match=f"rewinds to {length} tokens; expected from {first} to {last}"):
                subject.backend.rewind(length)
        subject.backend.rewind(first)
        assert_floats(subject.backend.decode(_random(5, subject.width)), subject.manifest.model.language.vocab_size)


def _prefill(
    subject: Subject, image: ImageAlignment, prompt: tuple[Floats, Integers, Integers], capacity: int = CAPACITY
) -> Floats:
    return _behind(subject, None, image, prompt, capacity)


def _behind(
    subject: Subject,
    prefix: KvPrefix | None,
    image: ImageAlignment,
    prompt: tuple[Floats, Integers, Integers],
    capacity: int = PREFIX + CAPACITY,
) -> Floats:
    rows, latents, questions = prompt
    logits: Floats = subject.backend.prefill(rows, image, latents, questions, capacity, prefix).copy()
    return logits
