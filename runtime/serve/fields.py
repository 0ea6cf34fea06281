"""Types of a request's fields, for pydantic: they validate, and describe themselves in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from fusion_edge.runtime.arguments import MAX_CHARACTERS
from fusion_edge.runtime.errors import printable

MAX_KEYS = 64
"""Limit of keys of an object: more than any has fields."""


class Fields(BaseModel):
    """A JSON object of a request: no unknown field, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_keys(cls, value: Any) -> Any:
        """Refuse an object of far more keys than there are fields, for which pydantic would write as many errors."""
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise PydanticCustomError("too_long", "an object has more than {limit} keys", {"limit": MAX_KEYS})
        return value


class Only:
    """Annotation of a field without effect: null and neutral values are accepted, others refused by name."""

    def __init__(self, *neutral: object, remedy: str) -> None:
        self._neutral = neutral
        self._remedy = remedy

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": [*self._neutral, None], "description": f"No effect: {self._remedy}."}

    def _check(self, value: object) -> None:
        is_flag = isinstance(value, bool)
        if value is not None and not any(is_flag == isinstance(one, bool) and value == one for one in self._neutral):
            raise PydanticCustomError("unsupported", "this value is not supported: {remedy}", {"remedy": self._remedy})


def by_type(**names: type) -> Discriminator:
    """Return what tells the options of a union apart by the value's type. Each option has a ``Tag`` such as ``<text>``.

    An error is then about the one option that the value means. ``names`` are the tags' names.
    """
    tags: dict[type, str] = {kind: f"<{name}>" for name, kind in names.items()}
    kinds: dict[type, str] = {str: "a string", list: "a list"}
    expected = "expected " + " or ".join(kinds[kind] for kind in tags)
    return Discriminator(lambda value: tags.get(type(value)), custom_error_type="union", custom_error_message=expected)


def by_field(name: str, *values: str) -> Discriminator:
    """Return what tells the options of a union of objects apart by the text in one field, which is their ``Tag``."""

    def tag(value: object) -> str | None:
        given = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        return f"<{given}>" if given in values else None

    expected = f"expected an object whose {name} is {', '.join(values[:-1])} or {values[-1]}"
    return Discriminator(tag, custom_error_type="union", custom_error_message=expected)


def path_of(location: tuple[int | str, ...]) -> str:
    """Return the place of an error as clients write it, without tags: ``messages[0].content[1].image_url``."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (step.startswith("<") and step.endswith(">")):
            name = printable(step[:MAX_CHARACTERS])
            path += f".{name}" if path else name
    return path
