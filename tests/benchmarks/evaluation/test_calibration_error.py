"""Expected calibration error: exact values, and a plain reference."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusion_edge.benchmarks.evaluation.calibration_error import Bin, expected_calibration_error, reliability

ANSWERS = st.lists(st.tuples(st.integers(0, 1000).map(lambda n: n / 1000), st.booleans()), max_size=60)


def reference(answers: list[tuple[float, bool]], bins: int) -> float:
    """Return the error, bin by bin, from sums: |sum of confidences - right answers| / all answers."""
    edges = [number / bins for number in range(bins)]
    sums = [0.0] * bins
    for confidence, is_right in answers:
        number = max(n for n, edge in enumerate(edges) if confidence >= edge)
        sums[number] += confidence - is_right
    return sum(map(abs, sums)) / max(len(answers), 1)


@example([(number / 10, True) for number in range(11)], 10)
@given(ANSWERS, st.sampled_from([1, 2, 5, 10]))
def test_error_equals_the_reference(answers: list[tuple[float, bool]], bins: int) -> None:
    confidences, is_right = [c for c, _ in answers], [r for _, r in answers]
    assert expected_calibration_error(confidences, is_right, bins) == pytest.approx(reference(answers, bins), abs=1e-12)
    filled = reliability(confidences, is_right, bins)
    assert sum(bin.count for bin in filled) == len(answers)
    assert all(bin.low <= bin.confidence <= bin.high for bin in filled)


def test_bins_by_hand() -> None:
    assert reliability([0.25, 0.5, 1.0], [False, True, False], bins=2) == (
        Bin(low=0.0, high=0.5, count=1, confidence=0.25, accuracy=0.0),
        Bin(low=0.5, high=1.0, count=2, confidence=0.75, accuracy=0.5),
    )


def test_a_calibrated_model_has_no_error() -> None:
    assert expected_calibration_error([0.8] * 5, [True] * 4 + [False]) == pytest.approx(0)
    assert expected_calibration_error([1.0] * 4, [False] * 4) == 1
    assert expected_calibration_error([], []) == 0


@pytest.mark.parametrize(
    ("confidences", "is_right", "message"),
    [
        ([0.5], [True, False], "differ"),
        ([[0.5]], [[True]], "differ"),
        ([1.5], [True], "outside 0 to 1"),
        ([-0.1], [True], "outside 0 to 1"),
        ([float("nan")], [True], "outside 0 to 1"),
    ],
)
def test_wrong_arguments(confidences: list[float], is_right: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reliability(confidences, is_right)
