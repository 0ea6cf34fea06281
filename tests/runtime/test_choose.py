"""``Fusion.choose``: exact scores, lists of questions, deadlines and cancels, and arguments."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.fake_backend import FakeBackend
from fakes.watched_backend import backend, picture, watched_fusion
from support.demo_model import PICTURE, PLACE_QUESTION, PLACES, PRESENCE_QUESTIONS
from support.paths import DEMO_CHECKPOINT, GOLDEN

from fusion_edge.export import cli
from fusion_edge.export.model import architecture
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.runtime import Cancelled, DeadlineExceeded, Fusion, FusionError, Sampling, Turn, UsageError, load
from fusion_edge.runtime.backends.base import Floats, ImageAlignment, Integers
from fusion_edge.runtime.stages import DECODE_STEP, PREFILL, WAITING

QUESTION = "Is the path clear?"
CHOICES = ("yes", "yellow", "no", "the door is open", "the door is closed", "1", "é", "è")
"""Some share their first tokens: letters, words, a byte of UTF-8."""


class TeacherForcing(EagerBackend):
    """Scores sequences in one run each, over the prompt and all tokens."""

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        *arguments: Any,
    ) -> Floats:
        self.rows = embeddings
        positions = self._tensor(latent_positions), self._tensor(question_positions)
        self.alignment = Alignment(*positions, image.keys, image.values)
        return super().prefill(embeddings, image, latent_positions, question_positions, *arguments)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int]) -> float:
        """Return the log-probability of tokens behind the latest prompt."""
        ids = np.array(token_ids)
        operations = type(self).operations(self)
        operations.cache = None
        rows = self._tensor(np.concatenate([self.rows, self.embed(ids)]))[None]
        hidden = architecture.decoder(operations, self.config, rows, self.alignment)
        logits = architecture.logits(operations, self.config, hidden[0, len(self.rows) - 1 : -1])
        return float(torch.log_softmax(logits, -1)[range(len(ids)), ids].sum())


@pytest.mark.parametrize(
    ("checkpoint", "image", "history"),
    [
        ("FUSION-tiny-Phi", "phi_one_turn", [Turn("What is it?", "A door.")]),
        ("FUSION-X-tiny-LLaMA", "llama_one_turn", []),
    ],
)
def test_scores_equal_the_eager_interpreter(checkpoint: str, image: str, history: list[Turn], tmp_path: Path) -> None:
    folder, frame = tmp_path / "bundle", GOLDEN / f"{image}.png"
    assert cli.main([str(GOLDEN / checkpoint), "-o", str(folder), "--fp32", "--query-len", "16"]) == 0
    with load(folder) as fusion, open_checkpoint(GOLDEN / checkpoint, TeacherForcing) as eager:
        chosen = fusion.choose(frame, QUESTION, CHOICES, history=history)
        stepwise = eager.choose(frame, QUESTION, CHOICES, history=history, query_length=16)
        assert isinstance(eager.backend, TeacherForcing)
        sequences = fusion.pipeline.prompts.encode_choices(history, QUESTION, CHOICES, room=100)
        expected = [eager.backend.score(tokens) for tokens in sequences]
    assert list(stepwise.logprobs.values()) == pytest.approx(expected, abs=1e-4)
    assert list(chosen.logprobs.values()) == pytest.approx(expected, abs=2e-3)
    assert max(expected) - min(expected) > 1
    assert chosen.text == CHOICES[int(np.argmax(expected))]
    weights = [math.exp(logprob) for logprob in expected]
    assert list(chosen.probabilities.values()) == pytest.approx([w / sum(weights) for w in weights], abs=1e-3)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusion]:
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(folder), "--int4", "--kv-cache", "int8"]) == 0
    with load(folder) as fusion:
        yield fusion


def test_a_choice_has_the_probability_of_the_same_answer(demo: Fusion) -> None:
    answer = demo.answer(PICTURE, PLACE_QUESTION)
    assert answer.text in PLACES
    assert len(answer.token_ids) > 1
    chosen = demo.choose(PICTURE, PLACE_QUESTION, PLACES)
    assert chosen.text == answer.text
    assert chosen.logprobs[answer.text] == pytest.approx(math.fsum(answer.logprobs), abs=1e-6)
    assert answer.confidence == pytest.approx(math.exp(chosen.logprobs[answer.text] / len(answer.token_ids)), abs=1e-6)
    assert chosen.prompt_tokens == answer.prompt_tokens


def test_a_score_does_not_depend_on_the_other_choices(demo: Fusion) -> None:
    """Rewinding an int8 cache leaves no trace."""
    together = demo.choose(PICTURE, PLACE_QUESTION, (*PLACES, "nothing", "there"))
    for place in PLACES:
        alone = demo.choose(PICTURE, PLACE_QUESTION, (place, "nothing"))
        assert alone.logprobs[place] == pytest.approx(together.logprobs[place], abs=1e-6)


def test_a_list_of_questions_equals_single_questions(demo: Fusion) -> None:
    questions = [*PRESENCE_QUESTIONS]
    together = demo.choose(PICTURE, questions, ("yes", "no"))
    for question, chosen in zip(questions, together, strict=True):
        alone = demo.choose(PICTURE, question, ("yes", "no"))
        assert chosen.logprobs == pytest.approx(alone.logprobs, abs=1e-9)
        assert chosen.text == alone.text
        assert chosen.timings_ms.keys() == alone.timings_ms.keys()
    assert demo.choose(PICTURE, PRESENCE_QUESTIONS[:1], ("yes", "no"))[0].text == together[0].text


def test_log_probabilities_of_an_answer(demo: Fusion) -> None:
    answer = demo.answer(PICTURE, PLACE_QUESTION, sampling=Sampling(logprobs=3))
    assert len(answer.logprobs) == len(answer.top_logprobs) == len(answer.token_ids)
    for token, logprob, top in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 3
    plain = demo.answer(PICTURE, PLACE_QUESTION)
    assert plain.logprobs == pytest.approx(answer.logprobs, abs=1e-9)
    assert plain.top_logprobs == ()
    assert 0 < plain.confidence <= 1


def test_an_unlikely_token_is_among_the_top_ones(demo: Fusion) -> None:
    """Sampling at a high temperature chooses tokens beyond the likeliest."""
    sampling = Sampling(max_new_tokens=8, temperature=50, seed=1, logprobs=2)
    answer = demo.answer(PICTURE, PLACE_QUESTION, sampling=sampling)
    assert [len(top) for top in answer.top_logprobs] == [3] * 8
    assert [top[token] for token, top in zip(answer.token_ids, answer.top_logprobs, strict=True)] == list(
        answer.logprobs
    )


# Control, with a backend that has no graphs ------------------------------------------------------------------------


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    return watched_fusion(tiny_bundle)


def names(fusion: Fusion) -> list[str]:
    assert isinstance(fusion.backend, FakeBackend)
    return [name for name, _ in fusion.backend.calls]


def test_one_prefill_scores_all_choices(fusion: Fusion) -> None:
    fusion.choose(picture(), QUESTION, ("yes", "yellow", "no"))
    calls = names(fusion)
    assert calls.count("prefill") == 1
    sequences = fusion.pipeline.prompts.encode_choices([], QUESTION, ("yes", "yellow", "no"), room=100)
    inner = {tokens[:length] for tokens in sequences for length in range(1, len(tokens))}
    assert calls.count("decode") == len(inner)
    assert calls.count("encode") == 2


def test_timings_of_a_list_are_those_of_each_question(fusion: Fusion) -> None:
    started = time.perf_counter()
    chosen = fusion.choose(picture(), [QUESTION, "Why?", "Where?"], CHOICES)
    passed = 1000 * (time.perf_counter() - started)
    assert all(min(one.timings_ms.values()) >= 0 for one in chosen)
    assert 0 < sum(sum(one.timings_ms.values()) for one in chosen) < passed


def test_stages(fusion: Fusion) -> None:
    stages: list[str] = []
    fusion.choose(picture(), QUESTION, ("yes", "no"), on_stage=stages.append)
    assert stages == ["preprocess", "encode global crops", "encode local crop", "alignment", PREFILL, DECODE_STEP]


@pytest.mark.parametrize("stage", [PREFILL, DECODE_STEP])
def test_cancel(fusion: Fusion, stage: str) -> None:
    def cancel(entered: str) -> None:
        if entered == stage:
            fusion.cancel()

    expected = fusion.choose(picture(), QUESTION, CHOICES)
    with pytest.raises(Cancelled) as error:
        fusion.choose(picture(), QUESTION, CHOICES, on_stage=cancel)
    assert error.value.stage == stage
    assert error.value.partial.text == ""
    assert fusion.choose(picture(), QUESTION, CHOICES).logprobs == expected.logprobs


def let_the_deadline_pass(fusion: Fusion) -> None:
    assert fusion.queue._running is not None
    fusion.queue._running.due = 0


@pytest.mark.parametrize("stage", [PREFILL, DECODE_STEP])
def test_deadline(fusion: Fusion, stage: str) -> None:
    def pass_it(entered: str) -> None:
        if entered == stage:
            let_the_deadline_pass(fusion)

    with pytest.raises(DeadlineExceeded, match="The deadline of 600 s passed") as error:
        fusion.choose(picture(), QUESTION, CHOICES, deadline=600, on_stage=pass_it)
    assert error.value.stage == stage
    assert error.value.partial.timings_ms["vision"] > 0


def test_a_deadline_holds_for_all_questions_of_a_list(fusion: Fusion) -> None:
    prefills = 0

    def pass_it(entered: str) -> None:
        nonlocal prefills
        prefills += entered == PREFILL
        if prefills == 2:
            let_the_deadline_pass(fusion)

    with pytest.raises(DeadlineExceeded):
        fusion.choose(picture(), [QUESTION] * 3, ("yes", "no"), deadline=600, on_stage=pass_it)
    assert prefills == 2


def test_a_deadline_that_is_over_at_once(fusion: Fusion) -> None:
    with pytest.raises(DeadlineExceeded) as error:
        fusion.choose(picture(), QUESTION, CHOICES, deadline=1e-9)
    assert error.value.stage == WAITING
    assert names(fusion) == []


def test_a_conversation_continues_with_the_choice(fusion: Fusion) -> None:
    conversation = fusion.conversation(picture())
    first = conversation.choose(QUESTION, ("yes", "no"))
    assert conversation.history == [Turn(QUESTION, first.text)]
    second = conversation.choose("Why?", CHOICES)
    again = fusion.choose(picture(), "Why?", CHOICES, history=[Turn(QUESTION, first.text)])
    assert second.logprobs == again.logprobs
    with pytest.raises(Cancelled):
        conversation.choose("And now?", CHOICES, on_stage=lambda stage: fusion.cancel())
    with pytest.raises(UsageError, match="expected at least two"):
        conversation.choose("And now?", ["yes"])
    assert [turn.question for turn in conversation.history] == [QUESTION, "Why?"]


def test_whitespace_around_a_choice_is_not_in_the_history(fusion: Fusion) -> None:
    conversation = fusion.conversation(picture())
    choice = conversation.choose(QUESTION, ("yes" + 2000 * " ", "no" + 2000 * " "))
    assert conversation.history == [Turn(QUESTION, choice.text.strip())]
    conversation.choose("Why?", ("yes", "no"))


def test_a_choice_ends_a_stream(fusion: Fusion) -> None:
    stream = fusion.stream(picture(), QUESTION, sampling=Sampling(max_new_tokens=6))
    next(stream)
    fusion.choose(picture(), QUESTION, CHOICES)
    with pytest.raises(FusionError, match="ended because another question was asked"):
        next(stream)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", "expected a list of strings"),
        (["yes"], "expected at least two"),
        (["yes", None], "is of type NoneType; expected a string"),
        (["yes", ""], "The choice '' is empty"),
        (["yes", "half \ud800"], "A choice is not valid Unicode"),
        (["yes", "yes"], "are equal"),
        (["yes", " yes "], "are equal"),
        (["yes", "▁yes"], "are equal"),  # SentencePiece's spelling of a space
        (["yes", "yesterday"], "'yes' is the start of 'yesterday'"),
        ([str(number) + "." for number in range(300)], "There are 300 choices; expected at most 256"),
    ],
)
def test_wrong_choices_are_refused_before_anything_runs(fusion: Fusion, choices: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fusion.choose(picture(), QUESTION, choices)
    assert names(fusion) == []


def test_a_choice_that_exceeds_the_context(fusion: Fusion) -> None:
    with pytest.raises(FusionError, match=r"tokens, and the context has room for \d+ behind the prompt"):
        fusion.choose(picture(), QUESTION, ["yes", "no, " * 300])
    assert names(fusion) == []


def test_a_choice_that_fills_the_context(fusion: Fusion) -> None:
    length = fusion.choose(picture(), QUESTION, ("yes", "no")).prompt_tokens
    room = fusion.max_context - length
    (word,) = fusion.pipeline.prompts.encode_choices([], QUESTION, ["n"], room=room)
    assert len(word) == 1
    text = "n" * (room + 1)
    while len(fusion.pipeline.prompts.encode_choices([], QUESTION, [text], room=10_000)[0]) > room:
        text = text[:-1]
    backend(fusion).calls.clear()
    fusion.choose(picture(), QUESTION, ("yes", text))
    assert names(fusion).count("decode") >= room - 1


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([], "The list of questions is empty"),
        ([QUESTION, ""], "The question is empty"),
        ([QUESTION, 1], "The question is of type int; expected a string"),
        (None, "The question is of type NoneType; expected a string"),
    ],
)
def test_wrong_questions(fusion: Fusion, question: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fusion.choose(picture(), question, ("yes", "no"))
    assert names(fusion) == []


def test_a_closed_model(fusion: Fusion) -> None:
    fusion.close()
    with pytest.raises(UsageError, match="has been closed"):
        fusion.choose(picture(), QUESTION, ("yes", "no"))
