"""JSON to frozen dataclasses by their annotations, strictly: exact keys and exact types."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], data: object, name: str = "") -> T:
    """Convert parsed JSON to the dataclass ``kind``: the inverse of ``dataclasses.asdict``.

    Annotations may be ``int``, ``float``, ``str``, ``bool``, ``Any``, dataclasses, ``tuple[X, ...]``,
    ``Mapping[str, X]`` and ``X | None``.

    Raises ``ValueError`` with a part of a sentence such as ``model.vision.width is 'x', not an integer``. ``name``
    prefixes the names of fields.
    """
    return cast(T, _value(kind, data, name))


def _value(kind: Any, data: object, name: str) -> object:
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass(cast("type[object]", kind), _typed(dict, data, name), name)
    arguments = get_args(kind)
    if get_origin(kind) is UnionType:
        return None if data is None else _value(arguments[0], data, name)
    if get_origin(kind) is tuple:
        items = _typed(list, data, name)
        return tuple(_value(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(items))
    if get_origin(kind) is Mapping:
        entries = _typed(dict, data, name).items()
        return {key: _value(arguments[1], item, f"{name}[{key!r}]") for key, item in entries}
    return _typed(kind, data, name)


def _dataclass(kind: type[object], data: dict[str, object], name: str) -> object:
    hints = get_type_hints(kind)
    dot = f"{name}." if name else ""
    for key in hints.keys() ^ data.keys():
        raise ValueError(f"{dot}{key} is {'missing' if key in hints else 'unknown'}")
    return kind(**{key: _value(hint, data[key], f"{dot}{key}") for key, hint in hints.items()})


_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _typed(kind: type[T], data: object, name: str) -> T:
    if type(data) is not kind:  # not isinstance: True is an int in Python
        raise ValueError(f"{name or 'it'} is {reprlib.repr(data)}, not {_NAMES[kind]}")
    return data
