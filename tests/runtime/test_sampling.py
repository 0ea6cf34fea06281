"""Sampling: checks of its parameters, greedy choice, top-k, nucleus and seeds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.sampling import Sampler, Sampling, distribution

LOGITS = arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32) | st.sampled_from([-1.0, 0.0, 2.0])
)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", [0, -1, 1.5, None, True, "8"]),
        ("temperature", [-0.1, float("nan"), float("inf"), "hot", None, True]),
        ("top_p", [0, 0.0, 1.01, -1, float("nan"), None, "1"]),
        ("top_k", [-1, 2.0, None, False]),
        ("seed", [-1, 0.5, "seed", True]),
        ("logprobs", [-1, 21, 1.0, True, None, "5"]),
        ("stop", ["###", ["###"], ("",), ("ok", ""), (1,), None]),
        ("grammar", ["[0-9]+", {"type": "integer"}, 3]),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{field} is .*; expected"):
            Sampling(**{field: value})


def test_a_grammar_excludes_stop_strings() -> None:
    with pytest.raises(UsageError, match=r"^stop and grammar exclude each other"):
        Sampling(grammar=Grammar.regex("a"), stop=("b",))


class Even:
    """A constraint in place of :class:`Constraint`: even tokens, each once."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        masked: np.ndarray[Any, Any] = logits.copy()
        masked[1::2] = masked[self.accepted] = -np.inf
        return masked

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.01}])
def test_a_constraint_comes_before_temperature_top_k_and_top_p(options: dict[str, Any]) -> None:
    constraint: Any = Even()
    sampler = Sampler(Sampling(**options), constraint)
    logits = np.array([1, 9, 3, 8, 2, 7], np.float32)
    assert [sampler(logits) for _ in range(3)] == [2, 4, 0]
    assert constraint.accepted == [2, 4, 0]
    with pytest.raises(FusionError, match="logits contain -inf"):  # nothing is left
        sampler(logits)


def test_values_in_range() -> None:
    Sampling(max_new_tokens=1, temperature=0, top_p=1, top_k=0, seed=0, stop=("###", "\n"), logprobs=20)
    numpy_values: dict[str, Any] = {"top_k": np.int64(3), "temperature": np.float32(0.5), "seed": np.int32(1)}
    assert Sampler(Sampling(**numpy_values))(np.array([0, 1], np.float32)) in (0, 1)


@settings(deadline=None)
@given(LOGITS)
def test_greedy_returns_the_first_of_equal_maxima(logits: np.ndarray[Any, Any]) -> None:
    assert Sampler(Sampling())(logits) == logits.tolist().index(max(logits.tolist()))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0, np.nan, 3], [np.nan] * 3, [0, np.inf, 1], [-np.inf] * 3])
def test_logits_that_are_not_finite(temperature: float, bad: list[float]) -> None:
    with pytest.raises(FusionError, match="logits contain"):
        Sampler(Sampling(temperature=temperature))(np.array(bad, np.float32))


def reference(logits: np.ndarray[Any, Any], temperature: float, top_k: int) -> tuple[list[int], list[float]]:
    """Reference of temperature and top-k in plain loops: ids and probabilities, likeliest first."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[: top_k or None]
    weights = [math.exp((float(logits[i]) - float(logits.max())) / temperature) for i in order]
    return order, [weight / sum(weights) for weight in weights]


@settings(deadline=None, max_examples=300)
@given(LOGITS, st.floats(0.05, 5), st.floats(0.01, 1), st.integers(0, 45))
def test_distribution_equals_the_reference(
    logits: np.ndarray[Any, Any], temperature: float, top_p: float, top_k: int
) -> None:
    order, probabilities = reference(logits, temperature, top_k)
    masses = list(itertools.accumulate(probabilities))
    if top_p < 1:
        assume(all(abs(mass - top_p) > 1e-9 for mass in masses))  # rounding decides there
        kept = 1 + sum(mass < top_p for mass in masses)
        order, probabilities = order[:kept], [p / masses[kept - 1] for p in probabilities[:kept]]
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    candidates, ours = distribution(logits, sampling)
    assert dict(zip(candidates.tolist(), ours.tolist(), strict=True)) == pytest.approx(
        dict(zip(order, probabilities, strict=True)), abs=1e-12
    )


def test_nucleus_is_the_smallest_set_that_reaches_its_mass() -> None:
    logits = np.log(np.array([0.125, 0.5, 0.25, 0.125])).astype(np.float32)
    for top_p, expected in [(0.1, [1]), (0.49, [1]), (0.6, [1, 2]), (0.8, [1, 2, 0]), (0.9, [1, 2, 0, 3])]:
        assert distribution(logits, Sampling(temperature=1, top_p=top_p))[0].tolist() == expected


def test_nucleus_with_equal_logits() -> None:
    logits = np.zeros(4, np.float32)
    for top_p, kept in [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)]:
        candidates, _ = distribution(logits, Sampling(temperature=1, top_p=top_p))
        assert candidates.tolist() == list(range(kept))


def test_top_k_keeps_the_first_of_equals() -> None:
    logits = np.array([1, 3, 1, 3, 1], np.float32)
    assert distribution(logits, Sampling(temperature=1, top_k=3))[0].tolist() == [1, 3, 0]


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.6, 0.0, 0.3, 0.1])
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities).astype(np.float32)
    sampler = Sampler(Sampling(temperature=1, seed=5))
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4)
    assert counts[1] == 0
    assert np.abs(counts / 4000 - probabilities).max() < 0.03


@settings(deadline=None)
@given(LOGITS, st.integers(0, 2**64))
def test_equal_seeds_give_equal_tokens(logits: np.ndarray[Any, Any], seed: int) -> None:
    one, other = (Sampler(Sampling(temperature=1.5, seed=seed)) for _ in range(2))
    assert [one(logits) for _ in range(10)] == [other(logits) for _ in range(10)]


def test_different_seeds_and_none_differ() -> None:
    logits = np.zeros(1000, np.float32)
    assert len({Sampler(Sampling(temperature=1, seed=seed))(logits) for seed in range(20)}) > 10
    assert len({Sampler(Sampling(temperature=1))(logits) for _ in range(20)}) > 10


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([-5, 30, 29, -np.inf], np.float32)
    sampler = Sampler(Sampling(temperature=temperature, top_p=0.9, seed=1))
    assert {sampler(logits) for _ in range(20)} == {1}
