"""Scores of answers, and confidence intervals of shares."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.benchmarks.evaluation.scores import Share, contains, is_exact, wilson


@pytest.mark.parametrize(
    ("given_text", "expected", "exact", "contained"),
    [
        ("red", "red", True, True),
        (" red\n", "red", True, True),
        ("Red", "red", False, True),
        ("It is red.", "red", False, True),
        ("Yes, the path is clear.", "the path is clear", False, True),
        ("nothing", "no", False, False),
        ("north-west", "west", False, True),
        ("two red circles", "two circles", False, False),
        ("", "red", False, False),
        ("是的，有。", "是的", False, True),
        ("STRASSE", "straße", False, True),
        ("+", "+", True, True),
        ("1 + 1", "+", False, False),
        ("", "", True, True),
    ],
)
def test_texts(given_text: str, expected: str, exact: bool, contained: bool) -> None:
    assert is_exact(given_text, expected) is exact
    assert contains(given_text, expected) is contained


@given(st.text(), st.text())
def test_an_exact_answer_contains_the_expected_one(text: str, around: str) -> None:
    assert contains(text, text)
    assert not is_exact(text, around) or contains(text, around)


def test_wilson_interval() -> None:
    """Values of Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for count, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_share_lies_in_its_interval(total: int, part: float) -> None:
    share = Share.of(math.floor(part * total), total)
    low, high = share.ci95
    assert 0 <= low <= share.share + 1e-12
    assert share.share - 1e-12 <= high <= 1
    assert low < high


def test_share_of_nothing() -> None:
    assert Share.of(0, 0) == Share(0, 0, 0.0, (0.0, 1.0))
