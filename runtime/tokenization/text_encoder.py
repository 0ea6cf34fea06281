"""Text as token ids: a template's control tokens and a user's words, which are text whatever they spell."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from tokenizers import AddedToken, Tokenizer

from fusion_edge.runtime.tokenization.errors import tokenizer_errors

_ANCHOR = "0"  # no normalizer changes a digit or joins it with what follows
_SPACES = "".join(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029)))
_SPACES += "\u202f\u205f\u3000"  # what the tokenizers library takes for whitespace; Python knows four more
_BLANK = "\u115f\u1160\u2581\u2800\u3164\uffa0\ufffc\U0001d159"
"""Characters that show nothing though their Unicode category says so of none."""


class TextEncoder:
    """A tokenizer with two ways to read what a user wrote.

    Control tokens are those that the tokenizer cuts out of a text before it tokenizes the rest (its added tokens).
    A piece of a prompt is the template's text and the user's in turns, the template's first. Safe to use by several
    threads. Raises :class:`FusionError` for a text on which the ``tokenizers`` library fails.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: id for id, token in self._added.items()}

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n characters takes at least n / longest_token tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Spellings of the control tokens that no answer shows."""
        return tuple(token.content for token in self._added.values() if token.special)

    @cached_property
    def _spellings(self) -> re.Pattern[str]:
        return any_of(self._ids)

    @tokenizer_errors()
    def beginning(self) -> list[int]:
        """What the tokenizer puts in front of a text: BOS, or nothing."""
        return list(self.tokenizer.encode("").ids)

    def encode(self, piece: Sequence[str], control_tokens: bool) -> list[int]:
        """Token ids of a piece, as the tokenizer gives them for the whole piece wherever the user's words spell no
        control token. Where they do, the spelling becomes a control token if ``control_tokens``, otherwise text.
        """
        ids = self.plain("".join(piece))
        if control_tokens or self._controls(ids) == self._controls(self.plain("".join(piece[::2]))):
            return ids
        return self._as_text(piece)

    @tokenizer_errors()
    def plain(self, text: str) -> list[int]:
        """Token ids as the tokenizer gives them, without BOS."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _controls(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self._added]

    def _as_text(self, piece: Sequence[str]) -> list[int]:
        """The tokenizer's own steps, with no other control tokens than the template's."""
        ids: list[int] = []
        stretches = list(self._stretches(piece))
        for (left, text), (right, _) in zip(stretches, [*stretches[1:], (None, "")], strict=True):
            if left is not None:
                ids.append(left)
            ids += self._between(left, text, right)
        return ids

    def _stretches(self, piece: Sequence[str]) -> Iterator[tuple[int | None, str]]:
        """Every control token of the template, None for the piece's start, with the text up to the next one."""
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
        """Ids of the text between two control tokens (None: an end of the piece), none of them a control token's."""
        if left is not None and self._added[left].rstrip:
            text = text.lstrip(_SPACES)
        if right is not None and self._added[right].lstrip:
            text = text.rstrip(_SPACES)
        if not text:
            return []
        normalizer, pre_tokenizer = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        if normalizer is not None:
            # A normalizer may put a space in front of all that it is given. That is a whole piece where control tokens
            # are cut out of normalized text, and what stands between two of them where they are cut out before.
            start, _, rest = normalizer.normalize_str(_ANCHOR + text).partition(_ANCHOR)
            text = rest if left is not None and self._added[left].normalized else start + rest
        words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer is not None else [text]
        return [token.id for word in words for token in self.tokenizer.model.tokenize(word)]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """What matches any of the texts, the longest that it can, as its only group."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})")


def is_empty(text: str, ignored: re.Pattern[str]) -> bool:
    """Whether a text has no visible character outside of what ``ignored`` matches."""
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
    """Separators, controls, format characters, unassigned ones, and marks, which need a letter."""
    return unicodedata.category(character)[0] in "CMZ" or character in _BLANK
