"""JSON schemas: what is supported, what is refused by name and place, and bounds of documents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fusion_edge.runtime.constraints.json_schema import bounded_schema
from fusion_edge.runtime.errors import UsageError


def refused(schema: Any) -> str:
    with pytest.raises(UsageError) as caught:
        bounded_schema(schema)
    message = str(caught.value)
    assert message.startswith("The JSON schema ")
    assert len(message) < 500
    return message.removeprefix("The JSON schema ")


def in_property(schema: Any, **keywords: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, **keywords}


def nested(levels: int, schema: Any) -> Any:
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


CYCLE: dict[str, Any] = {"type": "array"}
CYCLE["items"] = CYCLE


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (True, "is True; expected a dict"),
        ('{"type": "null"}', "expected a dict"),
        (None, "is None; expected a dict"),
        ({"type": "integer", "minimum": float("nan")}, "is not JSON"),
        ({"enum": [{1, 2}]}, "is not JSON"),
        ({"enum": ("a",)}, "is not JSON"),
        ({"type": "object", "properties": {1: {"type": "null"}}}, "a key is not a string"),
        ({"const": "\ud800"}, "is not JSON"),
        (CYCLE, "is not JSON"),
        (nested(2000, {"type": "null"}), "nested too deeply"),
        ({"enum": ["a" * 70_000]}, "the limit is 65536"),
    ],
)
def test_what_is_not_a_schema(schema: Any, reason: str) -> None:
    assert reason in refused(schema)


@pytest.mark.parametrize(
    "keyword",
    [
        *("allOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
        *("uniqueItems", "contains", "minContains", "unevaluatedItems", "additionalItems"),
        *("contentEncoding", "contentMediaType", "$anchor", "$dynamicRef", "$recursiveRef", "$vocabulary"),
        *("minimun", "nullable", "x-guidance", "discriminator", "maxLength", "minimum", "items"),
    ],
)
def test_other_keywords_are_refused_by_name_and_place(keyword: str) -> None:
    """llguidance ignores those that it does not know, such as misspelled ones."""
    schema = in_property({"type": "object", "properties": {"b": {"type": "null"}}, keyword: 1})
    message = refused(schema)
    assert message.startswith(f"is not supported at $.properties.a: '{keyword}' is not supported; expected only type, ")


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({}, "$", "has no type"),
        (in_property(True), "$.properties.a", "True is not supported"),
        (in_property({"type": "float"}), "$.properties.a", "has the type 'float'; expected one of null, boolean"),
        ({"type": []}, "$", "has the type []"),
        ({"type": "object"}, "$", "properties is None; expected 1 to 256"),
        ({"type": "object", "properties": {}}, "$", "properties is {}"),
        (in_property({"type": "null"}, required=["b"]), "$", "required names 'b', which is not in properties"),
        (in_property({"type": "null"}, required="a"), "$", "required is 'a'"),
        (in_property({"type": "null"}, additionalProperties={"type": "null"}), "$", "expected true or false"),
        ({"type": "array"}, "$.items", "None is not supported"),
        ({"type": "array", "items": [{"type": "null"}]}, "$.items", "is not supported"),
        ({"type": "array", "items": False}, "$.items", "False is not supported"),
        ({"type": "array", "prefixItems": {}}, "$", "prefixItems is {}"),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": True}, "$.items", "True is not supported"),
        ({"type": "array", "items": {"type": "null"}, "minItems": -1}, "$", "minItems is -1; expected an integer"),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 10_001}, "$", "maxItems is 10001"),
        ({"type": "string", "maxLength": 2.5}, "$", "maxLength is 2.5"),
        ({"type": "string", "minLength": True}, "$", "minLength is True"),
        ({"type": "string", "format": "regex"}, "$", "format 'regex' is not supported; expected one of date-time"),
        ({"type": "string", "format": ["date"]}, "$", "format ['date'] is not supported"),
        ({"type": "string", "pattern": 3}, "$", "pattern 3 is not supported"),
        ({"type": "integer", "minimum": "0"}, "$", "minimum is '0'; expected a number"),
        ({"type": "integer", "exclusiveMinimum": True}, "$", "exclusiveMinimum is True"),
        ({"type": "integer", "maximum": 2**53}, "$", "expected an integer up to 2^53 - 1"),
        ({"type": "number", "maximum": 0.1 + 0.2}, "$", "at most 15 digits"),
        ({"type": "number", "multipleOf": 0}, "$", "multipleOf 0 is not supported"),
        ({"type": "number", "multipleOf": -1}, "$", "multipleOf -1 is not supported"),
        ({"type": "number", "multipleOf": 1e-7}, "$", "at most 6 decimals"),
        ({"type": "number", "multipleOf": 10_000}, "$", "expected up to 1000"),
        ({"type": "number", "multipleOf": 1.001}, "$", "expected up to 1000"),
        ({"type": "number", "multipleOf": 0.003, "maximum": 1e13}, "$", "0.003 needs bounds of at most 10^12, so that"),
        ({"enum": []}, "$", "enum is []"),
        ({"enum": "a"}, "$", "enum is 'a'"),
        ({"enum": [["a"]]}, "$", "the value ['a'] is not supported"),
        ({"const": {}}, "$", "the value {} is not supported"),
        ({"const": 10**30}, "$", "expected an integer up to 2^53 - 1"),
        ({"enum": ["a"], "maxLength": 1}, "$", "'maxLength' is not supported"),
        ({"anyOf": []}, "$", "anyOf is []"),
        ({"anyOf": [{"type": "null"}, {}]}, "$.anyOf[1]", "has no type"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "$", "'type' is not supported"),
        ({"$ref": "other.json"}, "$", "expected '#/$defs/NAME'"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {"type": "null"}}}, "$", "$ref is '#/$defs/b'"),
        ({"$ref": 1}, "$", "$ref is 1"),
        ({"$ref": "#"}, "$", "$ref is '#'"),
        ({"type": "null", "$defs": []}, "$", "$defs is []; expected an object"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "$.$defs.a", "is recursive"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": nested(2, {"$ref": "#/$defs/a"})}},
            "$.$defs.a.items.items",
            "is recursive",
        ),
        (nested(33, {"type": "null"}), "$" + ".items" * 33, "it is nested more than 32 levels deep"),
    ],
)
def test_reasons(schema: Any, place: str, reason: str) -> None:
    message = refused(schema)
    assert message.startswith(f"is not supported at {place[:120]}"), message
    assert reason in message


def test_a_long_place_is_cut() -> None:
    assert len(refused(in_property({"type": "object", "properties": {"x" * 60_000: {}}}))) < 300


def test_annotations_are_dropped_and_objects_closed() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/a",
        "title": "A",
        "description": "d" * 60_000,
        **in_property({"type": "null", "default": None, "examples": [1], "$comment": "c", "deprecated": True}),
        "additionalProperties": True,
    }
    assert bounded_schema(schema) == {
        "type": ["object"],
        "properties": {"a": {"type": ["null"]}},
        "required": [],
        "additionalProperties": False,
        "$defs": {},
        "x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"},
    }


def test_definitions_are_kept_once() -> None:
    """A chain of definitions that each use the next one twice would double at each step if copied."""
    chain = {f"d{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(12)} | {
        "d12": {"type": "null"}
    }
    read = bounded_schema({"$ref": "#/$defs/d0", "$defs": chain})
    assert read["$ref"] == "#/$defs/0"
    assert len(read["$defs"]) == 13
    assert len(json.dumps(read)) < 3000


def test_depth_counts_through_definitions_that_were_read_before() -> None:
    """``a`` is read at level 1, and ``b`` around it later."""
    parts = {"a": nested(20, {"type": "null"}), "b": nested(9, {"$ref": "#/$defs/a"})}
    first = {"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": parts}
    assert len(bounded_schema(first)["$defs"]) == 2
    parts["b"] = nested(10, {"$ref": "#/$defs/a"})
    assert refused(first).startswith("is not supported at $.$defs.b.items.items.items.items.items.items.items.items.i")


def test_both_sections_of_definitions() -> None:
    both = {"$defs": {"a": {"type": "null"}}, "definitions": {"a": {"type": "boolean"}}}
    read = bounded_schema({"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/definitions/a"}], **both})
    assert read["anyOf"] == [{"$ref": "#/$defs/0"}, {"$ref": "#/$defs/1"}]
    assert read["$defs"] == {"0": {"type": ["null"]}, "1": {"type": ["boolean"]}}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, {"minimum": -(2**53) + 1, "maximum": 2**53 - 1}),
        ({"type": "integer", "exclusiveMinimum": 3}, {"minimum": 4, "maximum": 2**53 - 1}),
        ({"type": "integer", "minimum": 0.5, "exclusiveMaximum": 2.5}, {"minimum": 1, "maximum": 2}),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": 1, "maximum": 9}, {"minimum": 2, "maximum": 9}),
        (
            {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 0},
            {"minimum": -0.999999, "maximum": -1e-6, "multipleOf": 1e-6},
        ),
        (
            {"type": "number", "minimum": -1, "exclusiveMaximum": 0.35, "multipleOf": 0.3},
            {"minimum": -0.9, "maximum": 0.3, "multipleOf": 0.3},
        ),
        ({"type": "number"}, {"minimum": -(10**9), "maximum": 10**9, "multipleOf": 1e-5}),
        ({"type": "number", "minimum": 0, "maximum": 1}, {"minimum": 0, "maximum": 1, "multipleOf": 1e-6}),
        ({"type": "number", "maximum": 10**12, "minimum": 1}, {"minimum": 1, "maximum": 10**12, "multipleOf": 1e-2}),
        (
            {"type": "number", "maximum": 2**53 - 1, "minimum": 1},
            {"minimum": 1, "maximum": 2**53 - 1, "multipleOf": 1.0},
        ),
        ({"type": "number", "multipleOf": 0.25}, {"minimum": -(10**9), "maximum": 10**9, "multipleOf": 0.25}),
        ({"type": "string", "format": "time"}, {"format": "time", "maxLength": 256}),
        ({"type": "string", "format": "time", "maxLength": 9}, {"format": "time", "maxLength": 9}),
        ({"type": "string"}, {}),
    ],
)
def test_bounds(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    read = bounded_schema(schema)
    assert {k: v for k, v in read.items() if k not in ("type", "$defs", "x-guidance")} == expected
