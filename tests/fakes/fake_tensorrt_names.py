"""Enumerations of a version of TensorRT, made from the signatures of the real module."""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import Any

from support.tensorrt_signatures import ENUMERATION, Signatures, committed


class Enumeration(Enum):
    """Like pybind11's: a member equals itself only, and converts to its number."""

    def __int__(self) -> int:
        return int(self.value)


@cache
def signatures(library: str, version: str) -> Signatures:
    """Return the signatures of the newest committed version that is not newer, by major and minor number."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:2]]

    found = {one: names for (name, one), names in committed().items() if name == library}
    return found[max((one for one in found if numbers(one) <= numbers(version)), key=numbers)]


@cache
def enumerations(library: str, version: str) -> dict[str, Any]:
    """Return the enumerations that our code uses, by name, with the members that it uses."""
    known, found = signatures(library, version), dict[str, Any]()
    for name in [one for one, kind in known.items() if kind == ENUMERATION and "." not in one]:
        prefix = f"{name}."
        members = {
            one.removeprefix(prefix): int(number)
            for one, number in known.items()
            if one.startswith(prefix) and number.isdecimal()
        }
        found[name] = Enumeration(name, members)  # type: ignore[call-arg]  # mypy wants members in the source
    return found
