"""The bundle format page has a row for every field of the JSON files of a bundle, and for no other."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fusion_edge.runtime.bundle.engine_manifest import Engines
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport

PAGE = Path(__file__).parents[2] / "docs/reference/bundle-format.md"
NOT_WRITTEN = {"linears[].seconds"}
"""Fields that the file leaves out: a bundle has the same bytes on every run."""


def field_paths(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of every field: ``model.vision.width``, ``files[].path``, ``engines{}[].file.path``."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            path = f"{prefix}{'.' if prefix else ''}{field.name}"
            yield path
            yield from field_paths(hints[field.name], path)
        return
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (tuple, list):
        yield from field_paths(arguments[0], f"{prefix}[]")
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from field_paths(arguments[1], f"{prefix}{{}}")
    else:  # a union, such as EndToEnd | None
        for argument in arguments:
            yield from field_paths(argument, prefix)


def documented(file_name: str) -> list[str]:
    """Return the paths in the first column of the tables below a heading that names a file."""
    text = PAGE.read_text(encoding="utf-8")
    section = re.split(rf"^## `{re.escape(file_name)}`$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("file_name", "kind"),
    [("bundle.json", Manifest), ("quantization.json", QuantizationReport), ("engines.json", Engines)],
)
def test_every_field_has_a_row(file_name: str, kind: type) -> None:
    rows = documented(file_name)
    assert len(rows) == len(set(rows))
    written = set(field_paths(kind)) - NOT_WRITTEN
    assert set(rows) == written
