"""Read fields of a checkpoint's JSON files. An invalid field raises an error that names it and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.runtime.errors import FusionError

LARGEST_INTEGER = 2**31 - 1  # largest size in config.json; ONNX Runtime counts tokens in int32
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, 2.0**127  # about the range of float32
LONGEST_VALUE = 500  # characters of a value in a message


class JsonFields:
    """A JSON object of a checkpoint. All methods raise :class:`FusionError` for an invalid field."""

    def __init__(self, path: Path, data: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        """Read the object.

        Args:
            path: JSON file.
            data: The object, if it has been read or is nested.
            prefix: Path of a nested object inside the file, such as ``rope_scaling.``.
        """
        self.path = path
        self.prefix = prefix
        self.data = read_json_object(path) if data is None else data

    def invalid(self, name: str, expected: str) -> FusionError:
        """Return the error for a field, with a description of the ``expected`` value."""
        value = repr(self.data[name]) if name in self.data else "missing"
        value = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
        return FusionError(f"{self.path}: {self.prefix}{name} is {value}; expected {expected}.")

    def inner(self, name: str) -> JsonFields:
        """Return a nested object."""
        value = self.data.get(name)
        if not isinstance(value, dict):
            raise self.invalid(name, "an object")
        return JsonFields(self.path, value, f"{self.prefix}{name}.")

    def one_of(self, name: str, allowed: tuple[object, ...]) -> Any:
        """Return a field whose value is one of ``allowed``. None allows a missing field."""
        value = self.data.get(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.invalid(name, " or ".join(repr(one) for one in allowed if one is not None))
        return value

    def integer(self, name: str, minimum: int = 1, default: int | None = None) -> int:
        """Return an integer of at least ``minimum``, or ``default`` if the field is missing or null."""
        value = self.data.get(name)
        value = default if value is None else value
        if type(value) is not int or not minimum <= value <= LARGEST_INTEGER:
            raise self.invalid(name, f"an integer from {minimum} to {LARGEST_INTEGER}")
        return value

    def number(self, name: str) -> float:
        """Return a positive number in the range of float32."""
        value = self.data.get(name)
        if not _is_positive(value):
            raise self.invalid(name, "a positive number in the range of float32")
        return float(value)

    def numbers(self, name: str, length: int) -> list[float]:
        """Return a list of ``length`` positive numbers in the range of float32."""
        value = self.data.get(name)
        if not isinstance(value, list) or len(value) != length or not all(map(_is_positive, value)):
            raise self.invalid(name, f"a list of {length} positive numbers")
        return [float(x) for x in value]


def _is_positive(value: object) -> TypeGuard[float]:
    # Graphs compute in float32. Compared, because math.isfinite overflows on an integer of 400 digits.
    return type(value) in (int, float) and SMALLEST_NUMBER <= value <= LARGEST_NUMBER  # type: ignore[operator]
