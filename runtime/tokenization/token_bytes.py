"""The bytes that each token adds to an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders

from fusion_edge.runtime.tokenization.errors import tokenizer_errors

ANCHOR = "a"
"""A token before another one. Decoders strip a space from the first token only."""


_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """Bytes of all tokens. An answer's text is the UTF-8 text of its tokens' bytes."""

    tokens: list[bytes]
    """By id. Empty for special tokens and for ids without a token, which add no text."""
    drops_first_space: bool
    """Whether a space at the start of the first token is not part of the text."""


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> TokenBytes:
    """Return the bytes of every id below ``vocab_size``, as :class:`Detokenizer` decodes them."""
    special = special_ids(tokenizer)
    tokens = [None if id in special else tokenizer.id_to_token(id) for id in range(vocab_size)]
    if is_byte_level(tokenizer):
        return TokenBytes([b"" if token is None else byte_level_bytes(token) for token in tokens], False)
    with tokenizer_errors():
        decode = tokenizer.decoder.decode
        bytes_of = {
            token: fallback_byte(token) or decode([ANCHOR, token])[len(ANCHOR) :].encode()
            for token in tokens
            if token is not None
        }
        spaced = next((token for token, content in bytes_of.items() if content.startswith(b" ")), None)
        drops_first_space = spaced is not None and not decode([spaced]).startswith(" ")
    return TokenBytes([b"" if token is None else bytes_of[token] for token in tokens], drops_first_space)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of special tokens."""
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is byte-level BPE (Llama): each character of a token encodes one byte of UTF-8."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a token of byte-level BPE. An added token is plain text."""
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
    except KeyError:
        return token.encode()


def fallback_byte(token: str) -> bytes:
    """Return the byte of a SentencePiece token such as ``<0xE2>``; nothing for every other token."""
    match = _BYTE.fullmatch(token)
    return bytes.fromhex(match[1]) if match else b""


def _byte_of_character() -> dict[str, int]:
    """Return byte-level BPE's alphabet: printable Latin-1 bytes stand for themselves, the others start at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
