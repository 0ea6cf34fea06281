"""The OpenAPI document says what the server does: schemathesis, and the definitions themselves."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from support.http_servers import HttpServer, chat
from support.openapi_cases import check_cases

from fusion_edge.runtime.serve.chat_request import ChatRequest
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.service_responses import ErrorResponse


@pytest.fixture
def document(shared_server: HttpServer) -> Any:
    return shared_server.get("/openapi.json").json


def validate(document: Any, name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}"} | {"components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def test_every_route_is_in_the_document(shared_server: HttpServer, document: Any) -> None:
    routes = {route.path.replace(":path", ""): route.methods for route in shared_server.app.routes}  # type: ignore[attr-defined]
    del routes["/openapi.json"]
    documented = {path: {method.upper() for method in methods} for path, methods in document["paths"].items()}
    assert documented == {path: methods - {"HEAD"} for path, methods in routes.items()}


def test_every_field_is_in_the_document(document: Any) -> None:
    names = {field.alias or name for name, field in ChatRequest.model_fields.items()}
    schema = document["components"]["schemas"]["ChatRequest"]
    assert schema["properties"].keys() == names
    assert schema["additionalProperties"] is False


def test_responses_are_as_documented(shared_server: HttpServer, document: Any) -> None:
    bodies: list[dict[str, Any]] = [
        {}, {"logprobs": True, "top_logprobs": 2}, {"max_tokens": None, "fusion": {"choices": ["a", "b"]}},
        {"fusion": {"deadline_ms": 60_000, "guide": "x"}},
    ]  # fmt: skip
    for fields in bodies:
        validate(document, "ChatCompletion", shared_server.ask(chat(**fields)).json)
        stream = chat(**fields, stream=True, stream_options={"include_usage": True})
        for event in shared_server.ask(stream).body.decode().split("\n\n")[:-2]:
            validate(document, "ChatCompletionChunk", json.loads(event.removeprefix("data: ")))
    validate(document, "ModelList", shared_server.get("/v1/models").json)
    validate(document, "Status", shared_server.get("/ready").json)
    validate(document, "ErrorResponse", shared_server.get("/x").json)


def test_errors_are_as_documented() -> None:
    for error in (ApiError(400, "x"), ApiError(503, "x", "y", "z", {"Retry-After": "1"})):
        assert ErrorResponse.model_validate(error.body(), strict=True).model_dump() == error.body()


def test_documented_requests_are_valid_in_both(document: Any) -> None:
    """What the document refuses, the server refuses, and the other way around, where a schema can say it."""
    for fields, is_valid in (
        ({}, True), ({"n": 1}, True), ({"n": 2}, False), ({"stop": ["a"] * 5}, False), ({"x": None}, False),
        ({"temperature": 2}, True), ({"temperature": 2.5}, False), ({"logit_bias": {}}, True), ({"tools": [1]}, False),
        ({"fusion": {"choices": ["a"]}}, False), ({"frequency_penalty": 0.0}, True), ({"stream": None}, True),
    ):  # fmt: skip
        body = chat(**fields)
        try:
            validate(document, "ChatRequest", body)
            documented = True
        except jsonschema.ValidationError:
            documented = False
        try:
            ChatRequest.model_validate(body)
            accepted = True
        except ValueError:
            accepted = False
        assert documented == accepted == is_valid, fields


def test_generated_requests(shared_server: HttpServer) -> None:
    statuses = check_cases(shared_server.url.removesuffix("/v1"), examples=10)
    assert statuses.total() > 30
    assert {status for status in statuses if status >= 500} <= {504}  # of requests with a deadline
