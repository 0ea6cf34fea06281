"""JSON files of a checkpoint with checked access: what a field is, and what was expected, in one error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.runtime.errors import FusionError

LARGEST_INTEGER = 2**31 - 1  # of a size in config.json; ONNX Runtime counts positions in int32
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, 2.0**127  # about those of float32
LONGEST_VALUE = 500  # characters of a message


class Fields:
    """A JSON object of a checkpoint with checked access to its fields."""

    def __init__(self, path: Path, data: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self.data = read_json_object(path) if data is None else data

    def wrong(self, name: str, expected: str) -> FusionError:
        value = repr(self.data[name]) if name in self.data else "missing"
        value = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
        return FusionError(f"{self.path}: {self.prefix}{name} is {value}; expected {expected}.")

    def inner(self, name: str) -> Fields:
        """An object inside."""
        value = self.data.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(self.path, value, f"{self.prefix}{name}.")

    def one_of(self, name: str, allowed: tuple[object, ...]) -> Any:
        """A field whose value must be one of ``allowed``; None among them allows its absence."""
        value = self.data.get(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.wrong(name, " or ".join(repr(one) for one in allowed if one is not None))
        return value

    def integer(self, name: str, minimum: int = 1, default: int | None = None) -> int:
        """A field, or ``default`` where it is missing or null."""
        value = self.data.get(name)
        value = default if value is None else value
        if type(value) is not int or not minimum <= value <= LARGEST_INTEGER:
            raise self.wrong(name, f"an integer from {minimum} to {LARGEST_INTEGER}")
        return value

    def number(self, name: str) -> float:
        value = self.data.get(name)
        if not _is_positive(value):
            raise self.wrong(name, "a positive number that float32 holds")
        return float(value)

    def numbers(self, name: str, length: int) -> list[float]:
        value = self.data.get(name)
        if not isinstance(value, list) or len(value) != length or not all(map(_is_positive, value)):
            raise self.wrong(name, f"a list of {length} positive numbers")
        return [float(x) for x in value]


def _is_positive(value: object) -> TypeGuard[float]:
    # Graphs compute with float32, where a smaller one is 0 and a larger one infinite. Compared, not asked by
    # math.isfinite: that overflows on an integer of 400 digits.
    return type(value) in (int, float) and SMALLEST_NUMBER <= value <= LARGEST_NUMBER  # type: ignore[operator]
