"""Choices compared with a reference's."""

from __future__ import annotations

import math

import pytest

from fusion_edge.benchmarks.evaluation.asking import Response
from fusion_edge.benchmarks.evaluation.reference import compare_choices


def choice(text: str, **probabilities: float) -> Response:
    return Response(text, (), "stop", 1.0, probabilities, {})


def test_divergence_of_choices() -> None:
    compared = compare_choices(choice("yes", yes=0.75, no=0.25), choice("no", yes=0.5, no=0.5))
    assert compared is not None
    assert not compared.is_same
    assert compared.kl_divergences == pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)])


def test_a_probability_of_zero_has_a_finite_divergence() -> None:
    """JSON has no infinity."""
    compared = compare_choices(choice("yes", yes=1.0, no=0.0), choice("no", yes=0.0, no=1.0))
    assert compared is not None
    assert 700 < compared.kl_divergences[0] < 710


def test_no_choices() -> None:
    assert compare_choices(choice(""), choice("yes", yes=1.0)) is None
