"""Bytes of tokens: an answer's text is the text of its tokens' bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.tokenizer_files import BYTE, LETTERS, LLAMA, PHI, RESERVED, load, sentencepiece_model, write_phi
from tokenizers import Tokenizer

from fusion_edge.runtime.tokenization.detokenizer import Detokenizer
from fusion_edge.runtime.tokenization.token_bytes import TokenBytes, token_bytes

PADDING = 7
TOKENIZERS = {folder: load(folder) for folder in (PHI, LLAMA)}
BYTES = {
    folder: token_bytes(tokenizer, tokenizer.get_vocab_size() + PADDING) for folder, tokenizer in TOKENIZERS.items()
}


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    text = Detokenizer(tokenizer)
    return "".join(map(text.push, ids)) + text.finish()


@pytest.mark.parametrize("folder", [PHI, LLAMA])
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_text_is_that_of_the_bytes(folder: Path, data: st.DataObject) -> None:
    found: TokenBytes = BYTES[folder]
    ids = data.draw(st.lists(st.integers(0, len(found.tokens) - 1), max_size=8))
    written = b"".join(found.tokens[id] for id in ids)
    try:
        expected = written.decode()
    except UnicodeDecodeError:
        assume(False)
    first = next((found.tokens[id] for id in ids if found.tokens[id]), b"")
    if found.drops_first_space and first.startswith(b" "):
        expected = expected[1:]
    assert text_of(TOKENIZERS[folder], ids) == expected


@pytest.mark.parametrize("folder", [PHI, LLAMA])
def test_every_byte_has_a_token(folder: Path) -> None:
    """So that every text can be spelled."""
    assert {content for content in BYTES[folder].tokens if len(content) == 1} == {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize("folder", [PHI, LLAMA])
def test_special_tokens_and_padding_have_no_bytes(folder: Path) -> None:
    tokens = BYTES[folder].tokens
    special = [id for id, token in TOKENIZERS[folder].get_added_tokens_decoder().items() if token.special]
    assert special
    assert all(tokens[id] == b"" for id in special)
    assert tokens[-PADDING:] == [b""] * PADDING


def test_only_sentencepiece_drops_a_first_space() -> None:
    assert BYTES[PHI].drops_first_space
    assert not BYTES[LLAMA].drops_first_space


def test_a_token_that_only_looks_like_a_byte_is_text(tmp_path: Path) -> None:
    pieces = [*RESERVED, *LETTERS, ("<0xZZ>", -9.0, BYTE - 5)]
    tokenizer = load(write_phi(tmp_path / "phi", sentencepiece_model(pieces)))
    id = tokenizer.token_to_id("<0xZZ>")
    assert id is not None
    assert token_bytes(tokenizer, id + 1).tokens[id] == b"<0xZZ>" == text_of(tokenizer, [id]).encode()
