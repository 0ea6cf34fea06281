"""Scores of choices against plain products of probabilities, and the checks of choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.choices import MAX_CHOICES, TokenIds, check_choices, check_prefixes, likeliest, score
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.logprobs import LogProbabilities

VOCABULARY = 6


def next_logits(tokens: Sequence[int]) -> Floats:
    """Return logits that depend on every token of the sequence and their order."""
    seed = [len(tokens), *tokens]
    return np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32)


class Sequencer:
    """A model's sequence behind a prompt; all logits share one array, as those of a backend do."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.steps: list[TokenIds] = []
        self.rewinds: list[int] = []
        self._logits = np.empty(VOCABULARY, np.float32)

    def logits(self) -> Floats:
        self._logits[:] = next_logits(self.tokens)
        return self._logits

    def step(self, token: int) -> Floats:
        self.tokens.append(token)
        self.steps.append(tuple(self.tokens))
        return self.logits()

    def rewind(self, length: int) -> None:
        assert 0 <= length < len(self.tokens)
        self.rewinds.append(length)
        del self.tokens[length:]


def scored(sequences: Sequence[TokenIds]) -> tuple[list[float], Sequencer]:
    model = Sequencer()
    return score(sequences, model.logits(), model.step, model.rewind), model


def without_prefixes(sequences: list[TokenIds]) -> list[TokenIds]:
    return [one for one in sequences if not any(other != one and other == one[: len(other)] for other in sequences)]


SEQUENCES = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12, unique=True
).map(without_prefixes)


@settings(deadline=None, max_examples=300)
@given(SEQUENCES)
def test_a_score_is_the_sum_of_the_tokens_log_probabilities(sequences: list[TokenIds]) -> None:
    scores, model = scored(sequences)
    for sequence, ours in zip(sequences, scores, strict=True):
        expected = sum(LogProbabilities(next_logits(sequence[:place]))[token] for place, token in enumerate(sequence))
        assert ours == pytest.approx(expected, abs=1e-9)
    inner = {sequence[:length] for sequence in sequences for length in range(1, len(sequence))}
    assert sorted(model.steps) == sorted(inner)  # every inner node once, and nothing else
    assert math.fsum(map(math.exp, scores)) <= 1 + 1e-6  # disjoint events


def test_choices_of_one_token_need_no_step() -> None:
    _, model = scored([(1,), (2,), (5,)])
    assert model.steps == []


def test_common_first_tokens_run_once() -> None:
    _, model = scored([(1, 2, 3), (1, 2, 4), (1, 5), (0,)])
    assert model.steps == [(1,), (1, 2)]
    assert model.rewinds == []
    _, model = scored([(1, 2), (0, 2), (3, 4)])
    assert len(model.steps) == 3
    assert model.rewinds == [0, 0]


def test_long_choices_do_not_exhaust_the_stack() -> None:
    _, model = scored([(0,) * 3000, (1,)])
    assert len(model.steps) == 2999


def test_probabilities_are_renormalized_over_the_choices() -> None:
    chosen = likeliest(["no", "yes", "maybe"], [math.log(0.1), math.log(0.3), math.log(0.1)], 40, {"prefill": 2.0})
    assert chosen.text == "yes"
    assert chosen.probabilities == pytest.approx({"no": 0.2, "yes": 0.6, "maybe": 0.2})
    assert list(chosen.probabilities) == ["no", "yes", "maybe"]
    assert chosen.margin == pytest.approx(0.4)
    assert chosen.logprobs == {"no": math.log(0.1), "yes": math.log(0.3), "maybe": math.log(0.1)}
    assert (chosen.prompt_tokens, chosen.timings_ms) == (40, {"prefill": 2.0})


@given(st.lists(st.floats(-900, 0), min_size=2, max_size=20))
def test_probabilities_sum_to_one(logprobs: list[float]) -> None:
    choices = [f"choice {number}." for number in range(len(logprobs))]
    chosen = likeliest(choices, logprobs, 1, {})
    assert math.fsum(chosen.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert chosen.text == choices[logprobs.index(max(logprobs))]  # the first of equally likely ones
    assert chosen.margin >= 0


def test_impossible_choices() -> None:
    assert likeliest(["yes", "no"], [-math.inf, -3.0], 1, {}).probabilities == {"yes": 0, "no": 1}
    with pytest.raises(FusionError, match="gives every choice the probability 0"):
        likeliest(["yes", "no"], [-math.inf, -math.inf], 1, {})


def test_choices_are_copied() -> None:
    given_choices = ["yes", "no"]
    assert check_choices(given_choices) == ("yes", "no")
    assert check_choices(("yes", " no")) == ("yes", " no")
    assert len(check_choices([f"{number}." for number in range(MAX_CHOICES)])) == MAX_CHOICES


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", "The choices are 'yes'; expected a list of strings."),
        (None, "The choices are None; expected a list of strings."),
        ({"yes", "no"}, "expected a list of strings."),
        ([], "The choices are []; expected at least two."),
        (["yes"], "The choices are ['yes']; expected at least two."),
        (["yes", 1], "The choice 1 is of type int; expected a string."),
        (["yes", b"no"], "is of type bytes; expected a string."),
        ([f"{number}." for number in range(MAX_CHOICES + 1)], "There are 257 choices; expected at most 256."),
    ],
)
def test_wrong_choices(choices: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        check_choices(choices)
    assert message in str(error.value)


@settings(deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=2, max_size=6))
def test_every_prefix_is_found(texts: list[str]) -> None:
    is_comparable = not any(
        other.startswith(text) for number, text in enumerate(texts) for other in texts[:number] + texts[number + 1 :]
    )
    if is_comparable:
        check_prefixes(texts, texts)
    else:
        with pytest.raises(UsageError):
            check_prefixes(texts, texts)


def test_choices_that_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="The choices 'yes' and 'yes' are equal; drop one"):
        check_prefixes(["yes", "no", "yes"], ["yes", "no", "yes"])
    with pytest.raises(UsageError, match="The choice 'one' is the start of 'one hundred'"):
        check_prefixes(["two", "one", "one hundred"], ["two", "one", "one hundred"])


def test_prefixes_of_tokens() -> None:
    """Different texts may have equal tokens: U+2581 is a space of SentencePiece."""
    with pytest.raises(UsageError, match="The choices 'yes' and '▁yes' are equal"):
        check_prefixes(["yes", "▁yes"], [(5, 6), (5, 6)])
    with pytest.raises(UsageError, match="The choice 'ab' is the start of 'cd'"):
        check_prefixes(["ab", "cd"], [(1, 2), (1, 2, 3)])
    check_prefixes(["ab", "cd"], [(1, 2), (1, 3)])
