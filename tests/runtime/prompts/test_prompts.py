"""Prompts: token ids and positions, compared with the released code."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import GOLDEN
from support.released_prompts import render_prompt
from tokenizers import Tokenizer

from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.bundle.config import side
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.prompts.prompt import MARKER_IDS, Turn, encode_prompt

TURNS = [
    ("phi_one_turn", 0),
    ("phi_two_turns", 0),
    ("phi_two_turns", 1),
    ("phi_grid12", 0),
    ("llama_one_turn", 0),
]
IMAGE_TOKENS = {"phi_one_turn": 729, "phi_two_turns": 729, "phi_grid12": 144, "llama_one_turn": 576}


@functools.cache
def tokenizer(template: str) -> Tokenizer:
    if template == "llama_3":
        return Tokenizer.from_file(str(GOLDEN / "FUSION-X-tiny-LLaMA/tokenizer.json"))
    return Tokenizer.from_str(tokenizer_json(GOLDEN / "FUSION-tiny-Phi"))


def conversation(case: str, turn: int) -> tuple[dict[str, Any], list[Turn], str]:
    described = json.loads((GOLDEN / f"{case}.json").read_text("utf-8"))
    turns = described["turns"]
    history = [Turn(earlier["question"], earlier["reply"]) for earlier in turns[:turn]]
    return described, history, turns[turn]["question"]


@pytest.mark.parametrize(("case", "turn"), TURNS)
def test_prompts_equal_the_released_code(case: str, turn: int) -> None:
    described, history, question = conversation(case, turn)
    text = render_prompt(TEMPLATES[described["conversation"]], history, question)
    assert text == described["turns"][turn]["prompt"]


@pytest.mark.parametrize(("case", "turn"), TURNS)
def test_tokens_and_positions_equal_the_released_code(case: str, turn: int) -> None:
    described, history, question = conversation(case, turn)
    golden = np.load(GOLDEN / f"{case}.npz")
    name = described["conversation"]
    prompt = encode_prompt(tokenizer(name), TEMPLATES[name], history, question)
    np.testing.assert_array_equal(prompt.token_ids, golden[f"t{turn}_input_ids"])
    np.testing.assert_array_equal(prompt.instruct_ids, golden[f"t{turn}_instruct_ids"])

    image_tokens, query_length = IMAGE_TOKENS[case], described["query_len"]
    layout = prompt.layout(image_tokens, query_length)
    assert layout.latent_positions.shape == (turn + 1, query_length)
    np.testing.assert_array_equal(layout.latent_positions.ravel(), golden[f"t{turn}_vision_pos"])
    np.testing.assert_array_equal(layout.instruct_positions, golden[f"t{turn}_instruct_pos"])
    # Every row has exactly one use, and the prefill has the same number of rows.
    image_rows = range(layout.image_start, layout.image_end)
    assert len(image_rows) == image_tokens
    rows = [*layout.text_positions, *image_rows, *layout.latent_positions.ravel()]
    assert sorted(rows) == list(range(layout.length))
    assert layout.instruct_positions[-1] == layout.length - 1
    assert len(golden[f"t{turn}_logits_every_16th"]) == (layout.length + 15) // 16


def test_the_golden_image_tokens_are_the_grid() -> None:
    for case, image_tokens in IMAGE_TOKENS.items():
        described, _, _ = conversation(case, 0)
        assert described["image_grid"] in (None, side(image_tokens))


def test_bos_comes_once_and_only_if_the_tokenizer_adds_it() -> None:
    history = [Turn("What?", "A cat.")]
    llama = encode_prompt(tokenizer("llama_3"), TEMPLATES["llama_3"], history, "Where?")
    assert np.flatnonzero(llama.token_ids == 1000).tolist() == [0]
    assert np.flatnonzero(llama.instruct_ids == 1000).tolist() == [0]
    phi = encode_prompt(tokenizer("phi_3"), TEMPLATES["phi_3"], history, "Where?")
    assert 1 not in phi.token_ids
    assert 1 not in phi.instruct_ids


def test_instruct_positions_are_the_ends_of_earlier_prompts() -> None:
    # "\n\n" after the header and "\n" before the answer tokenize as one text.
    history = [Turn("What?", "\n\nA cat."), Turn("Where?", "")]
    template = TEMPLATES["llama_3"]
    prompt = encode_prompt(tokenizer("llama_3"), template, history, "Why?")
    for number, question in enumerate(["What?", "Where?", "Why?"]):
        then = encode_prompt(tokenizer("llama_3"), template, history[:number], question)
        assert prompt.instruct_indices[number] == len(then.token_ids) - 1
        layout, layout_then = prompt.layout(9, 4), then.layout(9, 4)
        assert layout.instruct_positions[number] == layout_then.length - 1
        np.testing.assert_array_equal(layout.latent_positions[: number + 1], layout_then.latent_positions)


@settings(deadline=None)
@given(
    questions=st.lists(st.text(min_size=1), min_size=1, max_size=4),
    answer=st.text(),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_any_text_gives_one_image_marker_and_one_latent_marker_per_question(
    questions: list[str], answer: str, name: str
) -> None:
    *earlier, question = [f"{text}?" for text in questions]
    history = [Turn(text, answer) for text in earlier]
    prompt = encode_prompt(tokenizer(name), TEMPLATES[name], history, question)
    markers = prompt.token_ids[prompt.token_ids < 0].tolist()
    latent, image = MARKER_IDS["<latent_image>"], MARKER_IDS["<image>"]
    assert markers == [latent, image] + [latent] * len(history)
    layout = prompt.layout(16, 4)
    assert layout.length == len(prompt.token_ids) + 15 + 3 * len(questions)
    assert layout.text_ids.min() >= 0
    assert (np.diff(layout.instruct_positions) > 0).all()


@pytest.mark.parametrize("text", [None, 7, b"What?", ["What?"], "half \ud800 a pair"])
def test_texts_that_are_not_unicode_are_refused(text: Any) -> None:
    phi = tokenizer("phi_3"), TEMPLATES["phi_3"]
    with pytest.raises(UsageError, match="question is"):
        encode_prompt(*phi, [], text)
    with pytest.raises(UsageError, match="question is"):
        encode_prompt(*phi, [Turn(text, "A cat.")], "Where?")
    with pytest.raises(UsageError, match="answer in the history is"):
        encode_prompt(*phi, [Turn("What?", text)], "Where?")
