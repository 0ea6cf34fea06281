"""A streaming detokenizer: token ids to pieces of text that never change."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.tokenization.errors import tokenizer_errors
from fusion_edge.runtime.tokenization.token_bytes import (
    ANCHOR,
    byte_level_bytes,
    fallback_byte,
    is_byte_level,
    special_ids,
)


class Detokenizer:
    """Decodes a growing answer piece by piece.

    The joined pieces are ``tokenizer.decode(ids, skip_special_tokens=True)`` of all pushed ids, cut before the first
    completed stop string (the longest, if one character completes several). The work per token does not depend on the
    length of the answer. Raises ``UsageError`` for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UsageError("A stop string is empty; pass at least one character, or drop it.")
        self._tokenizer = tokenizer
        self._skipped = special_ids(tokenizer)
        self._decoder: _TokenDecoder = _ByteLevel() if is_byte_level(tokenizer) else _ByteFallback(tokenizer)
        self._stop = tuple(stop)
        self._held = ""  # decoded text that may begin a stop string
        self._pieces: list[str] = []
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; no text follows."""
        return self._stopped

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Append a token and return the text that no later token can change; often empty."""
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        # An id without a token, of a padded vocabulary, decodes to nothing.
        return "" if token is None else self._emit(self._decoder.push(token))

    def finish(self) -> str:
        """Return the rest of the text. Bytes of an incomplete character become U+FFFD."""
        return self._emit(self._decoder.finish(), final=True)

    def _emit(self, text: str, final: bool = False) -> str:
        if self._stopped:
            return ""
        self._held += text
        cut = self._completed_stop()
        if cut is not None:
            self._stopped = True
        elif final:
            cut = len(self._held)
        else:
            cut = len(self._held) - self._begun_stop()
        piece, self._held = self._held[:cut], "" if self._stopped else self._held[cut:]
        if piece:
            self._pieces.append(piece)
        return piece

    def _completed_stop(self) -> int | None:
        """Return where the first completed stop string begins in the held text."""
        found = ((self._held.find(stop), len(stop)) for stop in self._stop)
        # Compare ends: the result must not depend on how tokens split the text.
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _begun_stop(self) -> int:
        """Return the length of the longest suffix of the held text that begins a stop string."""
        longest = len(self._held) + 1
        begun = (n for stop in self._stop for n in range(1, min(len(stop), longest)) if self._held.endswith(stop[:n]))
        return max(begun, default=0)


class _TokenDecoder(Protocol):
    def push(self, token: str) -> str: ...

    def finish(self) -> str: ...


class _ByteLevel:
    """Byte-level BPE (Llama): each character of a token encodes one byte of UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> str:
        return self._utf8.decode(byte_level_bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallback:
    """SentencePiece BPE (Phi): a token is text, with U+2581 for a space, or one byte such as ``<0xE2>``.

    Consecutive byte tokens wait for the next text token and decode together. If they are not valid UTF-8, each becomes
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.decoder
        self._begun = False
        self._waiting: list[str] = []

    def push(self, token: str) -> str:
        self._waiting.append(token)
        return "" if fallback_byte(token) else self.finish()

    @tokenizer_errors()
    def finish(self) -> str:
        # The decoder strips a space from the first token only, so an anchor precedes later ones.
        anchor = [ANCHOR] if self._begun else []
        text: str = self._decoder.decode(anchor + self._waiting)
        self._begun = self._begun or bool(self._waiting)
        self._waiting = []
        return text[len(anchor) :]
