"""The streaming detokenizer, compared with the decoding of the ``tokenizers`` library."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import GOLDEN
from tokenizers import Tokenizer

from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.tokenization.detokenizer import Detokenizer

TOKENIZERS = ("phi", "llama")


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    if name == "llama":
        return Tokenizer.from_file(str(GOLDEN / "FUSION-X-tiny-LLaMA/tokenizer.json"))
    return Tokenizer.from_str(tokenizer_json(GOLDEN / "FUSION-tiny-Phi"))


def stream(name: str, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], Detokenizer]:
    text_stream = Detokenizer(tokenizer(name), stop)
    pieces = [text_stream.push(token_id) for token_id in ids]
    pieces.append(text_stream.finish())
    assert text_stream.text == "".join(pieces)
    return pieces, text_stream


@functools.cache
def byte_tokens(name: str) -> list[int]:
    """Return the ids of single-byte tokens."""
    if name == "phi":
        vocabulary = tokenizer(name).get_vocab()
        return [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)]
    return list(range(256))


# Draws bytes, special tokens and ids without a token more often than by chance.
def token_ids(name: str) -> st.SearchStrategy[list[int]]:
    size = tokenizer(name).get_vocab_size()
    kinds = st.integers(0, size - 1) | st.sampled_from(byte_tokens(name)) | st.integers(size - 8, size + 8)
    return st.lists(kinds, max_size=60)


NAMED_IDS = st.sampled_from(TOKENIZERS).flatmap(lambda name: st.tuples(st.just(name), token_ids(name)))


@settings(deadline=None, max_examples=500)
@given(NAMED_IDS)
def test_joined_pieces_equal_the_tokenizers_decoding(named_ids: tuple[str, list[int]]) -> None:
    name, ids = named_ids
    pieces, _ = stream(name, ids)
    assert "".join(pieces) == tokenizer(name).decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(st.sampled_from(TOKENIZERS), st.text())
def test_valid_text_is_never_split_within_a_character(name: str, text: str) -> None:
    ids = tokenizer(name).encode(text, add_special_tokens=False).ids
    pieces, _ = stream(name, ids)
    assert "".join(pieces) == tokenizer(name).decode(ids, skip_special_tokens=True)
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("case", ["phi_one_turn", "phi_grid12", "llama_one_turn"])
def test_golden_replies(case: str) -> None:
    described = json.loads((GOLDEN / f"{case}.json").read_text("utf-8"))
    ids = np.load(GOLDEN / f"{case}.npz")["t0_output_ids"].tolist()
    _, text_stream = stream("llama" if case.startswith("llama") else "phi", ids)
    assert text_stream.text.strip() == described["turns"][0]["reply"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_emoji_arrives_whole(name: str) -> None:
    ids = tokenizer(name).encode("go 🤖 ok", add_special_tokens=False).ids
    pieces, _ = stream(name, ids)
    assert "".join(pieces) == "go 🤖 ok"
    assert [piece for piece in pieces if "🤖" in piece] != []
    assert sum(1 for piece in pieces if piece) > 2  # streamed, not held until the end


@pytest.mark.parametrize("name", TOKENIZERS)
def test_incomplete_bytes_become_replacement_characters_at_the_end(name: str) -> None:
    ids = tokenizer(name).encode("ok 🤖", add_special_tokens=False).ids[:-1]
    text_stream = Detokenizer(tokenizer(name))
    assert "".join(text_stream.push(token_id) for token_id in ids) == "ok "
    rest = text_stream.finish()
    assert rest
    assert set(rest) == {"�"}
    assert text_stream.finish() == ""


def expected_with_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Reference: the text before the first completed stop string, the longest of several."""
    for end in range(len(text) + 1):
        completed = [s for s in stop if text[:end].endswith(s)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


@settings(deadline=None, max_examples=500)
@given(
    NAMED_IDS,
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 8)), max_size=4),
    st.lists(st.text(alphabet="aeT hn�", min_size=1, max_size=3), max_size=2),
)
def test_stop_strings(named_ids: tuple[str, list[int]], spans: list[tuple[int, int]], others: list[str]) -> None:
    name, ids = named_ids
    text = tokenizer(name).decode(ids, skip_special_tokens=True)
    stop = [text[start : start + length] for start, length in spans if text[start : start + length]] + others
    pieces, text_stream = stream(name, ids, stop)
    assert ("".join(pieces), text_stream.stopped) == expected_with_stop(text, stop)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_start_of_a_stop_string_is_held_back(name: str) -> None:
    ids = tokenizer(name).encode("the software is the sofa", add_special_tokens=False).ids
    text_stream = Detokenizer(tokenizer(name), ["the sofa", "software of"])
    pieces = [text_stream.push(token_id) for token_id in ids]
    # the | software | is | the | s | of | a: the rest may still begin a stop string.
    assert pieces == ["", "the ", "software i", "s ", "", "", ""]
    assert text_stream.text == "the software is "
    assert text_stream.stopped
    assert text_stream.push(ids[0]) == text_stream.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        Detokenizer(tokenizer("llama"), ["ok", ""])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_time_per_token_does_not_grow(name: str) -> None:
    ids = tokenizer(name).encode("What color is the license? " * 20, add_special_tokens=False).ids

    def seconds(repeats: int) -> float:
        text_stream = Detokenizer(tokenizer(name), ["\n###"])
        for token_id in ids * repeats:
            text_stream.push(token_id)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for token_id in ids:
                text_stream.push(token_id)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(100) < 5 * seconds(1)
