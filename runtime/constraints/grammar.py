"""A grammar: what the text of an answer may be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.constraints.json_schema import bounded_schema
from fusion_edge.runtime.errors import UsageError

_MAX_PATTERN = 4096
_MAX_CHOICES = 1000


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer may be. Make it with :meth:`json`, :meth:`regex` or :meth:`choices`, which check it.

    Pass it as :attr:`Sampling.grammar`. Tokens that break the grammar are never sampled, and the answer ends only
    where the grammar allows it. Needs llguidance, the extra ``constrained``.
    """

    kind: Literal["json", "regex", "choices"]
    """What :attr:`source` is."""
    source: str
    """A JSON schema, a regular expression, or a JSON array of texts."""

    @staticmethod
    def json(schema: dict[str, Any]) -> Grammar:
        """Describe JSON documents that a schema allows.

        Args:
            schema: A JSON schema. The guide lists the supported keywords; every other one is refused.

        Raises:
            UsageError: The schema is invalid, too large or recursive, or has an unsupported keyword.
        """
        return Grammar("json", json.dumps(bounded_schema(schema)))

    @staticmethod
    def regex(pattern: str) -> Grammar:
        r"""Describe texts that a regular expression matches from start to end.

        Args:
            pattern: Syntax of Rust's ``regex``: no look-around, no back-references. ``\d`` is 0 to 9.

        Raises:
            UsageError: The pattern is empty or longer than 4,096 characters. Its syntax is checked with the question.
        """
        if not _is_text(pattern) or len(pattern) > _MAX_PATTERN:
            raise UsageError(
                f"The regular expression is {short_repr(pattern)}; expected a text of 1 to {_MAX_PATTERN} characters."
            )
        return Grammar("regex", pattern)

    @staticmethod
    def choices(texts: Iterable[str]) -> Grammar:
        """Describe an answer that is one of several texts.

        Args:
            texts: At most 1,000 different texts, without whitespace at their ends.

        Raises:
            UsageError: There is no text, or one is empty, given twice, or has whitespace at an end.
        """
        listed = [] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if not 0 < len(listed) <= _MAX_CHOICES:
            raise UsageError(f"The choices are {short_repr(texts)}; expected a list of 1 to {_MAX_CHOICES} texts.")
        for text in listed:
            if not _is_text(text) or text != text.strip():
                raise UsageError(
                    f"The choice {short_repr(text)} is not supported; expected a text without whitespace at its ends."
                )
        if len(set(listed)) != len(listed):
            repeated = max(listed, key=listed.count)
            raise UsageError(f"The choice {short_repr(repeated)} is given twice; list it once.")
        return Grammar("choices", json.dumps(listed, ensure_ascii=False))

    @property
    def title(self) -> str:
        """What messages call the grammar."""
        names = {"regex": "regular expression", "choices": "list of choices"}
        return "The JSON schema" if self.kind == "json" else f"The {names[self.kind]} {short_repr(self.source)}"


def _is_text(value: object) -> bool:
    """Return whether a value is a text with characters that UTF-8 can encode."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= c <= "\udfff" for c in value)
