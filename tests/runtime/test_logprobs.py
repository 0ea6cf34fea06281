"""Log-probabilities of tokens, and what the sampler keeps of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.logprobs import LogProbabilities
from fusion_edge.runtime.sampling import Sampler, Sampling

Logits = np.ndarray[Any, np.dtype[np.float32]]
LOGITS = arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32) | st.sampled_from([-math.inf, 0.0, 2.0])
).filter(lambda logits: np.isfinite(logits.max()))


def reference(logits: Logits) -> list[float]:
    """Return the logarithm of the softmax in plain loops."""
    values = [float(value) for value in logits]
    largest = max(values)
    normalizer = largest + math.log(math.fsum(math.exp(value - largest) for value in values))
    return [value - normalizer for value in values]


@settings(deadline=None)
@given(LOGITS)
def test_logprobs_equal_the_reference(logits: Logits) -> None:
    logprobs = LogProbabilities(logits)
    ours = [logprobs[token] for token in range(len(logits))]
    assert ours == pytest.approx(reference(logits), abs=1e-5)
    assert max(ours) <= 0
    assert logprobs.likeliest == logits.tolist().index(max(logits.tolist()))


@settings(deadline=None)
@given(LOGITS, st.integers(1, 45))
def test_top_tokens_are_the_likeliest_ones_in_order(logits: Logits, count: int) -> None:
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    possible = [token for token in order[:count] if logits[token] > -math.inf]
    logprobs = LogProbabilities(logits)
    assert list(logprobs.top(count).items()) == [(token, logprobs[token]) for token in possible]


def test_a_large_vocabulary_sums_to_one() -> None:
    """The sum of 128,256 weights in float32 is exact to 1e-6."""
    logits = np.random.default_rng(0).normal(0, 3, 128_256).astype(np.float32)
    logprobs = LogProbabilities(logits)
    assert math.fsum(math.exp(logprobs[token]) for token in range(len(logits))) == pytest.approx(1, abs=1e-6)
    assert logprobs[7] == pytest.approx(reference(logits)[7], abs=1e-6)


@pytest.mark.parametrize("bad", [[0, math.nan, 3], [0, math.inf, 1], [-math.inf] * 3])
def test_logits_that_are_not_finite(bad: list[float]) -> None:
    with pytest.raises(FusionError, match="logits contain"):
        LogProbabilities(np.array(bad, np.float32))


@settings(deadline=None)
@given(LOGITS, st.floats(0, 3), st.integers(0, 5), st.integers(0, 3))
def test_the_sampler_keeps_the_models_own_probabilities(
    logits: Logits, temperature: float, top_k: int, kept: int
) -> None:
    """Temperature and top-k change the choice, not the log-probability."""
    sampler = Sampler(Sampling(temperature=temperature, top_k=top_k, seed=1, logprobs=kept))
    tokens = [sampler(logits) for _ in range(4)]
    logprobs = LogProbabilities(logits)
    assert sampler.logprobs == [logprobs[token] for token in tokens]
    if kept == 0:
        assert sampler.top_logprobs == []
    else:
        expected = [logprobs.top(kept) | {token: logprobs[token]} for token in tokens]
        assert sampler.top_logprobs == expected
        assert all(token in top for token, top in zip(tokens, sampler.top_logprobs, strict=True))


def test_a_grammar_changes_the_choice_but_not_the_probability() -> None:
    """The log-probability of a token tells how likely it was before others were forbidden."""

    class Second:
        """Allows the second token alone."""

        def mask(self, logits: Logits) -> Logits:
            return np.where(np.arange(len(logits)) == 1, logits, -np.inf).astype(np.float32)

        def accept(self, token: int) -> None:
            assert token == 1

    constraint: Any = Second()
    logits = np.array([5, 1, 0], np.float32)
    sampler = Sampler(Sampling(logprobs=1), constraint)
    assert sampler(logits) == 1
    assert sampler.logprobs == [LogProbabilities(logits)[1]]
    assert list(sampler.top_logprobs[0]) == [0, 1]
    with pytest.raises(FusionError, match="logits contain -inf"):
        sampler(np.array([5, -np.inf, 0], np.float32))
