"""Random JSON schemas of every supported keyword, for tests and measurements.

Strings, arrays and depth are bounded, so that a model with random weights ends its documents.
"""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("clear", "blocked", "left", "right", "person", "größe", "距離", 'a "b"', "x/y", "")
_FORMATS = ("date", "time", "uuid", "ipv4")
_PATTERNS = ("^[A-Z]{2}-[0-9]{1,3}$", "^(left|right)( turn)?$", "^[a-zäöü]{0,4}$")


def random_schema(seed: int) -> dict[str, Any]:
    """Return a schema of an object, the same for the same seed."""
    return _Generator(random.Random(seed)).root()


class _Generator:
    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._leaves = 8  # left to place, which bounds the document
        self._definitions: dict[str, Any] = {}

    def root(self) -> dict[str, Any]:
        schema = self._object(0)
        return schema | ({"$defs": self._definitions} if self._definitions else {})

    def _any(self, depth: int) -> dict[str, Any]:
        kinds = [self._scalar] * 5
        if depth < 3 and self._leaves > 1:
            kinds += [lambda: self._object(depth), lambda: self._array(depth), lambda: self._union(depth)]
            kinds += [lambda: self._reference(depth)]
        return self._source.choice(kinds)()

    def _scalar(self) -> dict[str, Any]:
        self._leaves -= 1
        return self._source.choice(
            (self._number, self._number, self._string, self._string, self._values, self._simple)
        )()

    def _simple(self) -> dict[str, Any]:
        return self._source.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))

    def _number(self) -> dict[str, Any]:
        source = self._source
        kind = source.choice(("integer", "number"))
        schema: dict[str, Any] = {"type": kind}
        low = source.choice((-1000, -3, 0, 5, 0.25, -0.5))
        if source.random() < 0.7:
            schema[source.choice(("minimum", "exclusiveMinimum"))] = low
        if source.random() < 0.3:  # without a maximum, so that some number fits
            # Quarters are exact as floats, so that a validator's division is exact, too.
            schema["multipleOf"] = source.choice((1, 2, 5) if kind == "integer" else (0.25, 0.5, 2))
        elif source.random() < 0.7:
            schema[source.choice(("maximum", "exclusiveMaximum"))] = low + source.choice((2, 17, 99.5, 10**6))
        return schema

    def _string(self) -> dict[str, Any]:
        source = self._source
        chosen = source.random()
        if chosen < 0.2:
            return {"type": "string", "format": source.choice(_FORMATS), "maxLength": 40}
        if chosen < 0.4:
            return {"type": "string", "pattern": source.choice(_PATTERNS)}
        shortest = source.randrange(3)
        return {"type": source.choice(("string", ["string", "null"]))} | {
            "minLength": shortest,
            "maxLength": shortest + source.randrange(5),
        }

    def _values(self) -> dict[str, Any]:
        values = [*_WORDS, None, True, -2, 0.5, 10**12]
        chosen = self._source.sample(values, self._source.randint(1, 4))
        return {"const": chosen[0]} if len(chosen) == 1 else {"enum": chosen}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._source.sample(
            ("class", "distance m", "côté", "ok", 'quote"d', "id", "box"), self._source.randint(1, 3)
        )
        return {
            "type": "object",
            "description": "is not part of the grammar",
            "properties": {name: self._any(depth + 1) for name in names},
            "required": [name for name in names if self._source.random() < 0.6],
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> dict[str, Any]:
        if self._source.random() < 0.3:
            return {"type": "array", "prefixItems": [self._any(depth + 1) for _ in range(2)], "items": False}
        shortest = self._source.randrange(2)
        longest = shortest + self._source.randrange(2)
        return {"type": "array", "items": self._any(depth + 1), "minItems": shortest, "maxItems": longest}

    def _union(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth + 1) for _ in range(2)]}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"part{len(self._definitions)}"
        self._definitions[name] = {}  # taken, while its own parts are made
        self._definitions[name] = self._any(depth + 1)
        return {"$ref": f"#/$defs/{name}"}
