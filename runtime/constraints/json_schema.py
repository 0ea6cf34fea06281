"""JSON schemas of answers: an allowlist of keywords, and bounds that keep every document finite.

llguidance ignores keywords that it does not know, and lets a number have digits without end. So a schema is read
here, keyword by keyword, and written anew: every object is closed, every number has a range and a limit of digits.
Every document of the result is valid for the schema that was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Any

from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.errors import UsageError

_MAX_CHARACTERS = 65_536
_MAX_DEPTH = 32
_MAX_PATH = 120  # of a place in a message
_MAX_COUNT = 10_000  # of characters or items in minLength, maxItems and their like
_MAX_PROPERTIES = 256  # of an object; llguidance's parser handles some 500 optional ones
_MAX_OPTIONS = 64
_LARGEST_INTEGER = 2**53 - 1  # every parser of JSON reads integers up to here exactly
_LARGEST_NUMBER = 10**9  # if the schema has no bound
_SIGNIFICANT_DIGITS = 15  # decimals of so many digits differ as floats, so that no bound is crossed by rounding
_DECIMALS = 6
_MAX_MULTIPLE = 1000  # of multipleOf's digits: the matching automaton has as many states

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly")
)
_DEFINITIONS = ("$defs", "definitions")
_ROOT = frozenset(("$schema", "$id", *_DEFINITIONS))
_FORMATS = ("date-time", "date", "time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri")
_FORMAT_LENGTH = 256  # the format of a time has digits without end
_UNESCAPED = r"^[^\x00-\x1f\x22\x5c\x7f]*$"
"""Strings that JSON writes without escapes. llguidance 1.9 lets an escaped quote or backslash pass every class of
characters that has all control characters, such as ``[^"]``: so a string with a pattern has no escapes."""
_RANGE = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
KEYWORDS: dict[str, tuple[str, ...]] = {
    "null": (),
    "boolean": (),
    "integer": (*_RANGE, "multipleOf"),
    "number": (*_RANGE, "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
"""Supported keywords by type."""
_REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")
_OUTPUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""One space may follow a comma and a colon. More would let a model write spaces without end."""

Schema = dict[str, Any]


def bounded_schema(schema: object) -> Schema:
    """Return a schema for llguidance, all of whose documents are finite in depth and valid for ``schema``.

    Raises :class:`UsageError` for anything that is not supported, by name and place.
    """
    if not isinstance(schema, dict):
        raise UsageError(f"The JSON schema is {short_repr(schema)}; expected a dict.")
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        text.encode()
        if json.loads(text) != schema:
            raise ValueError("a key is not a string, or a value changes as JSON")
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"The JSON schema is not JSON ({reason}); expected a dict of JSON values.") from None
    if len(text) > _MAX_CHARACTERS:
        raise UsageError(f"The JSON schema has {len(text)} characters of JSON; the limit is {_MAX_CHARACTERS}.")
    return _Reader(schema).read()


class _Reader:
    """Reads a schema from the root, and each definition where it is used first."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._names: dict[str, str] = {}  # of definitions in the result, by reference
        self._definitions: dict[str, Schema] = {}  # finished ones, by their name in the result
        self._open: set[str] = set()  # names of definitions that were begun
        self._heights: dict[str, int] = {}  # levels of finished definitions
        self._deepest = 0  # level reached so far

    def read(self) -> Schema:
        for section in _DEFINITIONS:
            if not isinstance(self._root.get(section, {}), dict):
                raise _error("$", f"{section} is {short_repr(self._root[section])}; expected an object")
        result = self._schema({k: v for k, v in self._root.items() if k not in _ROOT}, "$", 0)
        return result | {"$defs": self._definitions, "x-guidance": _OUTPUT}

    def _schema(self, node: object, path: str, depth: int) -> Schema:
        self._reach(depth, path)
        if not isinstance(node, dict):
            raise _error(path, f"{short_repr(node)} is not supported; expected a schema with a type")
        node = {keyword: value for keyword, value in node.items() if keyword not in _ANNOTATIONS}
        for keyword, read in (("$ref", self._reference), ("anyOf", self._any_of)):
            if keyword in node:
                _only(node, (keyword,), path)
                return read(node[keyword], path, depth)
        if "enum" in node or "const" in node:
            _only(node, ("type", "enum", "const"), path)
            return _values(node, path)
        return self._typed(node, path, depth)

    def _reference(self, reference: object, path: str, depth: int) -> Schema:
        match = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
        section = self._root.get(match[1], {}) if match else {}
        if match is None or match[2] not in section:
            raise _error(path, f"$ref is {short_repr(reference)}; expected '#/$defs/NAME' with a NAME of $defs")
        name = self._names.setdefault(match[0], str(len(self._names)))
        if name not in self._definitions:
            if name in self._open:
                raise _error(path, f"$ref {short_repr(reference)} is recursive; expected a schema of bounded depth")
            self._open.add(name)
            before, self._deepest = self._deepest, depth
            self._definitions[name] = self._schema(section[match[2]], f"$.{match[1]}.{match[2]}", depth + 1)
            self._heights[name] = self._deepest - depth
            self._deepest = before
        self._reach(depth + self._heights[name], path)
        return {"$ref": f"#/$defs/{name}"}

    def _reach(self, depth: int, path: str) -> None:
        if depth > _MAX_DEPTH:
            raise _error(path, f"it is nested more than {_MAX_DEPTH} levels deep")
        self._deepest = max(self._deepest, depth)

    def _any_of(self, options: object, path: str, depth: int) -> Schema:
        if not isinstance(options, list) or not 0 < len(options) <= _MAX_OPTIONS:
            raise _error(path, f"anyOf is {short_repr(options)}; expected a list of 1 to {_MAX_OPTIONS} schemas")
        return {"anyOf": [self._schema(o, f"{path}.anyOf[{i}]", depth + 1) for i, o in enumerate(options)]}

    def _typed(self, node: Schema, path: str, depth: int) -> Schema:
        types = _types(node, path)
        _only(node, ("type", *(keyword for name in types for keyword in KEYWORDS[name])), path)
        result: Schema = {"type": types}
        if "string" in types:
            result |= _string(node, path)
        if "integer" in types or "number" in types:
            result |= _number(node, path, "number" in types)
        if "array" in types:
            result |= self._array(node, path, depth)
        if "object" in types:
            result |= self._object(node, path, depth)
        return result

    def _array(self, node: Schema, path: str, depth: int) -> Schema:
        result: Schema = {k: _count(node, k, path) for k in ("minItems", "maxItems") if k in node}
        first = node.get("prefixItems", [])
        if not isinstance(first, list) or len(first) > _MAX_OPTIONS:
            raise _error(path, f"prefixItems is {short_repr(first)}; expected a list of at most {_MAX_OPTIONS} schemas")
        if first:
            result["prefixItems"] = [
                self._schema(item, f"{path}.prefixItems[{i}]", depth + 1) for i, item in enumerate(first)
            ]
        rest = node.get("items", False if first else None)
        result["items"] = False if rest is False and first else self._schema(rest, f"{path}.items", depth + 1)
        return result

    def _object(self, node: Schema, path: str, depth: int) -> Schema:
        properties, required = node.get("properties"), node.get("required", [])
        if not isinstance(properties, dict) or not 0 < len(properties) <= _MAX_PROPERTIES:
            raise _error(path, f"properties is {short_repr(properties)}; expected 1 to {_MAX_PROPERTIES} properties")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _error(path, f"required is {short_repr(required)}; expected a list of names")
        if unknown := [name for name in required if name not in properties]:
            raise _error(path, f"required names {short_repr(unknown[0])}, which is not in properties; add it there")
        if not isinstance(node.get("additionalProperties", False), bool):
            raise _error(path, "additionalProperties is a schema; expected true or false, and all names in properties")
        return {
            "properties": {k: self._schema(v, f"{path}.properties.{k}", depth + 1) for k, v in properties.items()},
            "required": required,
            "additionalProperties": False,
        }


def _types(node: Schema, path: str) -> list[str]:
    given = node.get("type")
    types = [given] if isinstance(given, str) else given
    if not isinstance(types, list) or not types or not all(isinstance(t, str) and t in KEYWORDS for t in types):
        missing = "has no type" if "type" not in node else f"has the type {short_repr(given)}"
        raise _error(path, f"it {missing}; expected one of {', '.join(KEYWORDS)}, or enum, const, anyOf or $ref")
    return types


def _values(node: Schema, path: str) -> Schema:
    """Read ``enum`` and ``const``."""
    result: Schema = {"type": _types(node, path)} if "type" in node else {}
    listed = node.get("enum", [node.get("const")])
    if not isinstance(listed, list) or not listed:
        raise _error(path, f"enum is {short_repr(listed)}; expected a list of values")
    for value in [*listed, node.get("const")]:
        if isinstance(value, dict | list):
            raise _error(path, f"the value {short_repr(value)} is not supported; expected no object or array")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _exact(value, "a value", path)
    return result | {keyword: node[keyword] for keyword in ("enum", "const") if keyword in node}


def _string(node: Schema, path: str) -> Schema:
    result: Schema = {k: _count(node, k, path) for k in ("minLength", "maxLength") if k in node}
    checks: dict[str, tuple[Callable[[object], bool], str]] = {
        "pattern": (lambda value: isinstance(value, str), "a regular expression"),
        "format": (lambda value: value in _FORMATS, f"one of {', '.join(_FORMATS)}"),
    }
    for keyword, (is_supported, expected) in checks.items():
        if keyword in node:
            if not is_supported(node[keyword]):
                raise _error(path, f"{keyword} {short_repr(node[keyword])} is not supported; expected {expected}")
            result[keyword] = node[keyword]
    if "pattern" in result:
        result["allOf"] = [{"pattern": _UNESCAPED}]
    return {"maxLength": _FORMAT_LENGTH, **result} if "format" in result else result


def _number(node: Schema, path: str, has_fraction: bool) -> Schema:
    """Read a number. The bounds of the result are inclusive: llguidance lets ``-0`` and others pass exclusive ones."""
    given = {keyword: Fraction(str(_exact(node[keyword], keyword, path))) for keyword in _RANGE if keyword in node}
    largest = Fraction(_LARGEST_NUMBER if has_fraction else _LARGEST_INTEGER)
    if not {"minimum", "exclusiveMinimum"} & given.keys():
        given["minimum"] = -largest
    if not {"maximum", "exclusiveMaximum"} & given.keys():
        given["maximum"] = largest
    step = _step(node, max(map(abs, given.values())), path, has_fraction)
    rounded = {
        "minimum": lambda bound: ceil(bound / step),
        "exclusiveMinimum": lambda bound: floor(bound / step) + 1,
        "maximum": lambda bound: floor(bound / step),
        "exclusiveMaximum": lambda bound: ceil(bound / step) - 1,
    }
    steps = {keyword: rounded[keyword](bound) for keyword, bound in given.items()}
    result: Schema = {
        "minimum": _plain(step * max(steps[keyword] for keyword in _RANGE[::2] if keyword in steps)),
        "maximum": _plain(step * min(steps[keyword] for keyword in _RANGE[1::2] if keyword in steps)),
    }
    return result | {"multipleOf": _plain(step)} if has_fraction or "multipleOf" in node else result


def _step(node: Schema, largest: Fraction, path: str, has_fraction: bool) -> Fraction:
    """Return the number of which all numbers up to ``largest`` are multiples."""
    if "multipleOf" not in node:
        decimals = min(_DECIMALS, _SIGNIFICANT_DIGITS - len(str(int(largest))))
        return Fraction(1, 10 ** max(0, decimals)) if has_fraction else Fraction(1)
    value = _exact(node["multipleOf"], "multipleOf", path)
    decimal = Decimal(repr(value)).normalize()
    decimals = max(0, -int(decimal.as_tuple().exponent))
    if not (value > 0 and decimals <= _DECIMALS and decimal.scaleb(decimals) <= _MAX_MULTIPLE):
        raise _error(
            path,
            f"multipleOf {short_repr(value)} is not supported; expected up to {_MAX_MULTIPLE}, counting its digits "
            f"without the point, and at most {_DECIMALS} decimals",
        )
    if decimals and largest > 10 ** (_SIGNIFICANT_DIGITS - decimals):
        raise _error(
            path,
            f"multipleOf {short_repr(value)} needs bounds of at most 10^{_SIGNIFICANT_DIGITS - decimals}, so that "
            "floats are exact",
        )
    return Fraction(decimal)


def _plain(number: Fraction) -> int | float:
    """Return a number for JSON. One of few digits stays exact."""
    return int(number) if number.denominator == 1 else float(number)


def _exact(value: object, name: str, path: str) -> float:
    """Return a number that every parser reads alike: a small integer, or a decimal of few digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(path, f"{name} is {short_repr(value)}; expected a number")
    is_exact = abs(value) <= _LARGEST_INTEGER and (
        isinstance(value, int) or float(f"{value:.{_SIGNIFICANT_DIGITS}g}") == value
    )
    if not is_exact:
        raise _error(
            path,
            f"{name} is {short_repr(value)}; expected an integer up to 2^53 - 1 or a number of at most "
            f"{_SIGNIFICANT_DIGITS} digits",
        )
    return value


def _count(node: Schema, keyword: str, path: str) -> int:
    value = node[keyword]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise _error(path, f"{keyword} is {short_repr(value)}; expected an integer from 0 to {_MAX_COUNT}")
    return value


def _only(node: Schema, supported: tuple[str, ...], path: str) -> None:
    for keyword in node:
        if keyword not in supported:
            raise _error(path, f"{short_repr(keyword)} is not supported; expected only {', '.join(supported)}")


def _error(path: str, problem: str) -> UsageError:
    path = path if len(path) <= _MAX_PATH else path[:_MAX_PATH] + "..."
    return UsageError(f"The JSON schema is not supported at {path}: {problem}.")
