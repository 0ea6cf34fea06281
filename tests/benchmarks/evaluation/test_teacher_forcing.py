"""Log-probabilities of a reference: kept, forced and compared exactly."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.demo_model import PICTURE
from support.paths import DEMO_CHECKPOINT

from fusion_edge.benchmarks.evaluation.reference import check_comparable, vocabulary
from fusion_edge.benchmarks.evaluation.teacher_forcing import LogProbabilityFile, force, generate
from fusion_edge.export.reference.eager_backend import open_checkpoint
from fusion_edge.runtime import Fusion, Sampling, load
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.logprobs import divergences, log_softmax
from fusion_edge.runtime.requests import PreparedQuestion

LOGITS = arrays(np.float32, st.integers(2, 9), elements=st.floats(-50, 50, width=32))


def prepared(fusion: Fusion, tokens: int) -> PreparedQuestion:
    return fusion.pipeline.prepare(PICTURE, "How many?", sampling=Sampling(max_new_tokens=tokens))


def test_rows_are_kept_in_order() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(count, 7)).astype(np.float32) for count in (1, 3, 2)]
    with closing(LogProbabilityFile(7)) as kept:
        numbers = [kept.append(list(some)) for some in rows]
        for some, number in reversed(list(zip(rows, numbers, strict=True))):
            np.testing.assert_array_equal(kept.read(number), some)
    assert numbers == [range(0, 1), range(1, 4), range(4, 6)]


@given(LOGITS)
def test_log_softmax_sums_to_1(logits: np.ndarray) -> None:
    result = log_softmax(logits)
    assert np.exp(result.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(result - result[0], logits - logits[0], atol=1e-4)


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]), np.array([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]])
    with np.errstate(divide="ignore"):
        result = divergences(np.log(p).astype(np.float32), np.log(q).astype(np.float32))
    assert result == pytest.approx([math.log(2), 0], abs=1e-6)
    assert divergences(np.log(q[:1]).astype(np.float32), np.array([[-0.7, -0.7, -np.inf]], np.float32)) == [math.inf]


@given(LOGITS, st.data())
def test_divergence_is_never_negative(logits: np.ndarray, data: st.DataObject) -> None:
    others = data.draw(arrays(np.float32, len(logits), elements=st.floats(-50, 50, width=32)))
    assert divergences(log_softmax(logits)[None], log_softmax(others)[None])[0] >= 0
    assert divergences(log_softmax(logits)[None], log_softmax(logits)[None])[0] == 0


def test_own_tokens_give_the_same_rows(tiny_bundle: Path) -> None:
    with load(tiny_bundle) as fusion, closing(LogProbabilityFile(fusion.config.language.vocab_size)) as kept:
        answer = generate(fusion, prepared(fusion, 6), kept)
        expected = fusion.answer(PICTURE, "How many?", sampling=Sampling(max_new_tokens=6))
        assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
        assert len(answer.rows) == 6 + (expected.finish_reason == "stop")
        rows = kept.read(answer.rows)
        np.testing.assert_array_equal(force(fusion, prepared(fusion, 6), answer.token_ids, len(answer.rows)), rows)


def test_forced_tokens_are_followed(tiny_bundle: Path) -> None:
    """After other tokens, the rows are those of other sequences; the first row does not depend on them."""
    with load(tiny_bundle) as fusion:
        first, second = (force(fusion, prepared(fusion, 6), tokens, 3) for tokens in ((5, 6), (7, 6)))
        np.testing.assert_array_equal(first[0], second[0])
        assert not np.array_equal(first[1], second[1])
        np.testing.assert_array_equal(force(fusion, prepared(fusion, 6), (5, 9), 2), first[:2])


def test_reference_of_another_model(tiny_bundle: Path) -> None:
    with load(tiny_bundle) as fusion, open_checkpoint(DEMO_CHECKPOINT) as other:
        check_comparable(fusion, vocabulary(fusion), "tiny")
        with pytest.raises(UsageError, match="checkpoint has another vocabulary than tiny"):
            check_comparable(other, vocabulary(fusion), "tiny")
