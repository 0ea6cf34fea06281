"""Estimates over questions that share pictures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_edge.benchmarks.evaluation.calibration_error import expected_calibration_error
from fusion_edge.benchmarks.evaluation.paired import Pictures
from fusion_edge.benchmarks.evaluation.scores import wilson

questions = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=60)
"""Picture, and whether each of two models is right."""


@settings(max_examples=20, deadline=None)
@given(questions)
def test_intervals_hold_their_value_and_stay_in_range(asked: list[tuple[int, bool, bool]]) -> None:
    pictures, one, other = (np.array(column) for column in zip(*asked, strict=True))
    drawn = Pictures(pictures)
    loss = drawn.mean(one.astype(int) - other)
    assert loss.value == pytest.approx(one.mean() - other.mean())
    assert -1 <= loss.ci95[0] <= loss.ci95[1] <= 1
    accuracy = drawn.mean(one)
    assert 0 <= accuracy.ci95[0] <= accuracy.ci95[1] <= 1
    assert drawn.mean(one) == accuracy
    opposite = drawn.mean(other.astype(int) - one)
    assert opposite.ci95 == pytest.approx((-loss.ci95[1], -loss.ci95[0]), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(questions, st.randoms())
def test_order_and_numbers_of_pictures_do_not_matter(asked: list[tuple[int, bool, bool]], random: object) -> None:
    pictures, one, _ = (np.array(column) for column in zip(*asked, strict=True))
    order = np.random.default_rng(0).permutation(len(asked))
    shuffled = Pictures(pictures[order] + 100).mean(one[order])
    assert shuffled.ci95 == pytest.approx(Pictures(pictures).mean(one).ci95)


@settings(max_examples=20, deadline=None)
@given(questions, st.floats(0.1, 10))
def test_ratio_of_proportional_values_is_certain(asked: list[tuple[int, bool, bool]], factor: float) -> None:
    pictures = [picture for picture, _, _ in asked]
    others = np.arange(1, len(asked) + 1)
    ratio = Pictures(pictures).ratio(factor * others, others)
    assert ratio is not None
    assert (ratio.value, *ratio.ci95) == pytest.approx((factor, factor, factor))


def test_interval_of_independent_questions_is_the_binomial_one() -> None:
    right = np.random.default_rng(1).random(4000) < 0.9
    estimate = Pictures(np.arange(4000)).mean(right)
    assert estimate.ci95 == pytest.approx(wilson(int(right.sum()), 4000), abs=1e-3)


def test_questions_that_agree_within_a_picture_widen_the_interval() -> None:
    """Five equal questions a picture say as much as one: the interval is sqrt(5) times as wide."""
    right = np.repeat(np.random.default_rng(1).random(800) < 0.9, 5)
    apart, together = (Pictures(numbers).mean(right) for numbers in (np.arange(4000), np.arange(4000) // 5))
    widths = [high - low for low, high in (apart.ci95, together.ci95)]
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(5), rel=0.1)


def test_interval_covers_the_truth_in_95_percent_of_experiments() -> None:
    rng = np.random.default_rng(2)
    pictures = Pictures(np.arange(600) // 3)
    covered = 0
    for _ in range(300):
        chance = np.repeat(rng.beta(4, 1, 200), 3)  # mean 0.8, the same for a picture's questions
        low, high = pictures.mean(rng.random(600) < chance).ci95
        covered += low <= 0.8 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_ratio_to_what_may_be_nothing_is_none() -> None:
    difference = np.array([1, -1, 0, 0, 1, -1])
    assert Pictures(np.arange(6)).ratio(np.ones(6), difference) is None
    seldom = np.array([*np.zeros(196), 1, 1, 1, 1])  # absent from 2 % of resamples
    assert Pictures(np.arange(200)).ratio(np.ones(200), seldom) is None


@pytest.mark.parametrize(("value", "bounds"), [(0.0, (0.0, 1.0)), (1.0, (0.0, 1.0)), (0.0, (-1.0, 1.0))])
def test_equal_values_leave_a_chance_of_others(value: float, bounds: tuple[float, float]) -> None:
    """As Clopper and Pearson's interval of no event in 40 pictures."""
    estimate = Pictures(np.repeat(np.arange(40), 3)).mean(np.full(120, value), bounds)
    unseen = 1 - 0.025 ** (1 / 40)
    expected = [value + (unseen if bound != value else 0) * np.sign(bound - value) for bound in bounds]
    assert estimate.value == value
    assert estimate.ci95 == pytest.approx(expected)


def test_calibration_error_is_that_of_all_questions() -> None:
    rng = np.random.default_rng(3)
    confidences = rng.random(1000)
    right = rng.random(1000) < confidences**2
    estimate = Pictures(np.arange(1000) // 5).calibration_error(confidences, right)
    assert estimate.value == pytest.approx(expected_calibration_error(confidences, right))
    assert estimate.ci95[0] < estimate.value < estimate.ci95[1] < estimate.value + 0.08


def test_wrong_number_of_values_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        Pictures([0, 0, 1]).mean([1.0, 0.0])
