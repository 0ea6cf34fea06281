"""Choices as token ids behind a prompt: as answers in the history are tokenized."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizer_files import LLAMA, PHI, load
from tokenizers import AddedToken, Tokenizer, models

from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.prompts.prompt import PromptEncoder, Turn
from fusion_edge.runtime.tokenization.text_encoder import is_empty

QUESTION = "Is the path clear?"
HISTORIES: tuple[list[Turn], ...] = ([], [Turn("What is it?", "A door.")])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["yes", "No, it is not.", "<|end|> x", "<image>1", "é", "🙂", "▁yes", "a\nb"]
)


@functools.cache
def encoder(template: str) -> PromptEncoder:
    return PromptEncoder(load({"phi_3": PHI, "llama_3": LLAMA}[template]), TEMPLATES[template])


def encode(template: str, *choices: str, room: int = 100, control_tokens: bool = False) -> list[tuple[int, ...]]:
    return encoder(template).encode_choices([], QUESTION, choices, room=room, control_tokens=control_tokens)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(TEMPLATES)), st.sampled_from(HISTORIES), TEXTS, st.booleans())
def test_a_choice_is_tokenized_as_an_answer_in_the_history(
    template: str, history: list[Turn], text: str, control_tokens: bool
) -> None:
    prompts = encoder(template)
    if is_empty(text, prompts._ignored):
        with pytest.raises(UsageError, match="is empty"):
            prompts.encode_choices(history, QUESTION, [text], room=100)
        return
    (ids,) = prompts.encode_choices(history, QUESTION, [text], room=100, control_tokens=control_tokens)
    turns = [*history, Turn(QUESTION, text.strip())]
    later = prompts.encode(turns, "Why?", control_tokens=control_tokens)
    start = int(later.instruct_indices[len(history)]) + 1
    end = prompts._encoder.plain(TEMPLATES[template].answer_end)
    assert later.token_ids[start : start + len(ids) + 1].tolist() == [*ids, *end]
    prompt = prompts.encode(history, QUESTION, control_tokens=control_tokens)
    assert later.token_ids[:start].tolist() == prompt.token_ids.tolist()


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_whitespace_around_a_choice_is_dropped(template: str) -> None:
    plain, padded = encode(template, "yes", " \nyes\t ")
    assert plain == padded


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("\u200b", "is empty"),
        ("<image>", "is empty"),
        ("half \ud800", "A choice is not valid Unicode: character 5"),
    ],
)
def test_choices_that_are_no_text(template: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encode(template, "yes", text)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_choice_longer_than_the_room(template: str) -> None:
    (ids,) = encode(template, "the door is open")
    assert encode(template, "the door is open", room=len(ids)) == [ids]
    with pytest.raises(FusionError, match=f"has {len(ids)} tokens, and the context has room for {len(ids) - 1} "):
        encode(template, "the door is open", room=len(ids) - 1)
    with pytest.raises(FusionError, match=r"'a a a .*\.\.\. has at least \d+ tokens"):  # not tokenized
        encode(template, "a " * 1_000_000)


def test_control_tokens_are_text_unless_allowed() -> None:
    end = load(PHI).token_to_id("<|end|>")
    (as_text,), (as_token,) = (encode("phi_3", "x<|end|>y", control_tokens=allowed) for allowed in (False, True))
    assert end not in as_text
    assert end in as_token


@pytest.mark.parametrize("known", [["\n"], []])
def test_a_tokenizer_that_joins_a_choice_with_the_prompt(known: list[str]) -> None:
    """Without a pre-tokenizer, the end of the prompt and the choice are one word."""
    vocabulary = {word: id for id, word in enumerate(["unknown", *known])}
    joining = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    joining.add_special_tokens([AddedToken(token) for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")])
    prompts = PromptEncoder(joining, TEMPLATES["phi_3"])
    with pytest.raises(UsageError, match="The tokenizer joins the choice 'yes' with the text around it"):
        prompts.encode_choices([], QUESTION, ["yes"], room=100)
