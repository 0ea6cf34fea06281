"""An allowlist for a tokenizer's regular expressions: only those that match in bounded time."""

from __future__ import annotations

import re

_MAX_CHARACTERS = 100_000  # one that lists every added token is long
_MAX_DEGREE = 2  # of the polynomial time of a failing match; Llama's and GPT's have 2
_PIECE = re.compile(
    r"(?P<atom>\\[pP]\{\^?\w+\}|\\[^1-9kg]|\[\^?\]?(?:\\.|[^\[\]\\])+\]|[^\\\[\](){}*+?|])"
    r"|(?P<open>\((?:\?(?:[:!=]|i:))?)|(?P<close>\))|(?P<alternative>\|)"
    r"|(?P<endless>[*+][+?]?)|(?P<bounded>\?[+?]?|\{\d{1,2}(?:,\d{1,2})?\})"
)


def check_regex(pattern: str, degree: int = _MAX_DEGREE) -> None:
    """Raise ``ValueError`` for unsupported syntax, and for a pattern that may backtrack too long.

    Refuses repeated groups, and more than ``degree`` repetitions in a row: matching time is at most that power of
    the text's length.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise ValueError(f"a regular expression has {len(pattern)} characters, more than {_MAX_CHARACTERS}")
    position, before = 0, "open"
    degrees = [[0, 0]]  # per open group: the maximum of its alternatives, and the current one
    while position < len(pattern):
        piece = _PIECE.match(pattern, position)
        kind = piece.lastgroup if piece else None
        repeats = kind in ("endless", "bounded")
        optional = piece is not None and piece[0] == "?"
        if piece is None or (repeats and before != "atom" and not (optional and before == "close")):
            raise ValueError(f"a regular expression is not supported at {pattern[position : position + 20]!r}")
        if kind == "open":
            degrees.append([0, 0])
        elif kind in ("close", "alternative"):
            degrees[-1] = [max(degrees[-1]), 0]
            if kind == "close" and len(degrees) > 1:
                [most, _] = degrees.pop()
                degrees[-1][1] += most
        elif kind == "endless":
            degrees[-1][1] += 1
        position, before = piece.end(), str(kind)
    if max(map(max, degrees)) > degree:
        raise ValueError(f"a regular expression repeats more than {degree} times in a row")
