"""The grammar of ``response_format: {"type": "json_object"}``."""

from __future__ import annotations

from fusion_edge.runtime.constraints.grammar import Grammar

_STRING = r'"[^"\\\x00-\x1f\x7f]*"'
_NUMBER = r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,6})?"
_SCALAR = rf"({_STRING}|{_NUMBER}|true|false|null)"


def _list(item: str) -> str:
    return rf"({item}(, ?{item})*)?"


def _object(value: str) -> str:
    return rf"\{{{_list(f'{_STRING}: ?{value}')}\}}"


_VALUE = rf"({_SCALAR}|\[{_list(_SCALAR)}\]|{_object(_SCALAR)})"

JSON_OBJECT = Grammar.regex(_object(_VALUE))
"""A JSON object of any keys, without escapes in strings. Its values are scalars, and lists and objects of scalars: a
regular expression has a fixed depth."""
