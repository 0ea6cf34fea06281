"""Text to token ids, with control tokens in templates but not in user text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from tokenizers import AddedToken, Tokenizer

from fusion_edge.runtime.tokenization.errors import tokenizer_errors

_ANCHOR = "0"  # a digit, which no normalizer changes or joins with its successor
_SPACES = "".join(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029)))
_SPACES += "\u202f\u205f\u3000"  # whitespace of the tokenizers library; Python has four more
_BLANK = "\u115f\u1160\u2581\u2800\u3164\uffa0\ufffc\U0001d159"
"""Invisible characters in Unicode categories of visible ones."""


class TextEncoder:
    """Tokenizes template and user text.

    Control tokens are the tokenizer's added tokens, which it cuts out of a text before tokenizing the rest. A piece of
    a prompt alternates template and user text, starting with the template. Thread-safe. Raises :class:`FusionError` for
    a text on which the ``tokenizers`` library fails.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: id for id, token in self._added.items()}

    @cached_property
    def longest_token(self) -> int:
        """Length of the longest token: a text of n characters has at least n / longest_token tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Spellings of the special control tokens, which answers omit."""
        return tuple(token.content for token in self._added.values() if token.special)

    @cached_property
    def _spellings(self) -> re.Pattern[str]:
        return any_of(self._ids)

    @tokenizer_errors()
    def beginning(self) -> list[int]:
        """Return the ids that the tokenizer puts before a text: BOS, or nothing."""
        return list(self.tokenizer.encode("").ids)

    def encode(self, piece: Sequence[str], control_tokens: bool) -> list[int]:
        """Tokenize a piece of a prompt.

        A control token spelled in user text becomes a control token with ``control_tokens``, otherwise text.
        """
        ids = self.plain("".join(piece))
        if control_tokens or self._controls(ids) == self._controls(self.plain("".join(piece[::2]))):
            return ids
        return self._as_text(piece)

    @tokenizer_errors()
    def plain(self, text: str) -> list[int]:
        """Tokenize a text without BOS."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _controls(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self._added]

    def _as_text(self, piece: Sequence[str]) -> list[int]:
        """Tokenize a piece with the template's control tokens only, by the tokenizer's own steps."""
        ids: list[int] = []
        stretches = list(self._stretches(piece))
        for (left, text), (right, _) in zip(stretches, [*stretches[1:], (None, "")], strict=True):
            if left is not None:
                ids.append(left)
            ids += self._between(left, text, right)
        return ids

    def _stretches(self, piece: Sequence[str]) -> Iterator[tuple[int | None, str]]:
        """Yield each control token of the template, None for the start, with the text up to the next one."""
        left, text = None, ""
        for number, part in enumerate(piece):
            first, *rest = self._spellings.split(part) if number % 2 == 0 else [part]
            text += first
            for control, following in zip(rest[::2], rest[1::2], strict=True):
                yield left, text
                left, text = self._ids[control], following
        yield left, text

    @tokenizer_errors()
    def _between(self, left: int | None, text: str, right: int | None) -> list[int]:
        """Tokenize the text between two control tokens (None for an end of the piece) without control tokens."""
        if left is not None and self._added[left].rstrip:
            text = text.lstrip(_SPACES)
        if right is not None and self._added[right].lstrip:
            text = text.rstrip(_SPACES)
        if not text:
            return []
        normalizer, pre_tokenizer = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        if normalizer is not None:
            # A normalizer may prepend a space to its input. The input is the whole piece if control tokens are cut out
            # of normalized text, and the text between two of them if they are cut out before.
            start, _, rest = normalizer.normalize_str(_ANCHOR + text).partition(_ANCHOR)
            text = rest if left is not None and self._added[left].normalized else start + rest
        words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer is not None else [text]
        return [token.id for word in words for token in self.tokenizer.model.tokenize(word)]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern whose only group matches the longest of the texts."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})")


def is_empty(text: str, ignored: re.Pattern[str]) -> bool:
    """Return whether a text has no visible character outside matches of ``ignored``."""
    position = 0
    while position < len(text):
        if _is_invisible(text[position]):
            position += 1
        elif spelled := ignored.match(text, position):
            position = spelled.end()
        else:
            return False
    return True


def _is_invisible(character: str) -> bool:
    """Return whether a character is a separator, a control, a format, an unassigned one, or a mark without a letter."""
    return unicodedata.category(character)[0] in "CMZ" or character in _BLANK
