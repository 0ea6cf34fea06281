"""Grammars: checks of their arguments, equality."""

from __future__ import annotations

from typing import Any

import pytest

from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.errors import UsageError

INTEGER = {"type": "integer"}


def test_equal_content_is_an_equal_grammar() -> None:
    """Compiled grammars are kept by equality."""
    assert Grammar.json(INTEGER) == Grammar.json({"title": "Age", **INTEGER})
    assert len({Grammar.regex("a"), Grammar.regex("a"), Grammar.choices(["a"]), Grammar.choices(("a",))}) == 2
    assert Grammar.choices(["a", "b"]) != Grammar.choices(["b", "a"])


@pytest.mark.parametrize("pattern", ["", None, 7, b"a", "a" * 4097, "\ud800"])
def test_patterns(pattern: Any) -> None:
    with pytest.raises(UsageError, match=r"^The regular expression is .*; expected a text of 1 to 4096 characters\."):
        Grammar.regex(pattern)
    assert Grammar.regex("a" * 4096).source == "a" * 4096


@pytest.mark.parametrize("texts", [[], "yes", None, 3, [str(n) for n in range(1001)]])
def test_lists_of_choices(texts: Any) -> None:
    with pytest.raises(UsageError, match=r"^The choices are .*; expected a list of 1 to 1000 texts\."):
        Grammar.choices(texts)


@pytest.mark.parametrize("text", ["", " yes", "no\n", None, 1, "\udc00"])
def test_choices(text: Any) -> None:
    with pytest.raises(UsageError, match=r"^The choice .* is not supported; expected a text without whitespace"):
        Grammar.choices(["maybe", text])


def test_a_choice_given_twice_is_named() -> None:
    with pytest.raises(UsageError, match=r"^The choice 'no' is given twice; list it once\."):
        Grammar.choices(["yes", "no", "no"])
