"""The OpenAPI document, generated from the objects that validate requests and write responses."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import fusion_edge
from fusion_edge.runtime.serve.chat_request import LONGEST_DEADLINE_MS, ChatRequest
from fusion_edge.runtime.serve.chat_response import ChatCompletion, ChatCompletionChunk
from fusion_edge.runtime.serve.service_responses import ErrorResponse, ModelInfo, ModelList, Status

_ERRORS = {
    400: "A field is invalid; param names it.",
    401: "The API key is missing or wrong.",
    403: "Web pages of this origin may not ask.",
    404: "The path or the model does not exist.",
    405: "The path has other methods.",
    408: "The head or the body of the request arrived too slowly.",
    413: "The body is too large.",
    414: "The URL is too long.",
    415: "The body is not application/json.",
    421: "The header Host does not name this machine.",
    429: "The queue is full, or too many bodies arrive; Retry-After says when to ask again.",
    431: "The headers are too large.",
    500: "The model or the server failed.",
    501: "The server lacks a package.",
    503: "The model is being loaded, or the server shuts down.",
    504: "The deadline passed before the answer began.",
}


def openapi(model_name: str, deadline_header: str) -> dict[str, Any]:
    """Return the document of a server."""
    kinds = (ChatRequest, ChatCompletion, ChatCompletionChunk, ErrorResponse, ModelInfo, ModelList, Status)
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    schemas = definitions["$defs"]
    schemas["ChatRequest"]["properties"]["model"]["enum"] = [model_name]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fusion-serve",
            "version": fusion_edge.__version__,
            "description": f"OpenAI's chat completions, answered by {model_name}.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _chat(deadline_header)},
            "/v1/models": {"get": _get("List the served model.", {200: _json("The model.", ModelList)})},
            "/v1/models/{model}": {"get": _model()},
            "/health": {"get": _get("Whether the process works.", _statuses("It works.", "The load failed."))},
            "/ready": {
                "get": _get("Whether the model answers.", _statuses("It does.", "It does not yet, or no longer."))
            },
            "/metrics": {
                "get": _get(
                    "Metrics for Prometheus.",
                    {200: {"description": "Text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
                )
            },
        },
        "components": {"schemas": schemas},
    }


def _chat(deadline_header: str) -> dict[str, Any]:
    answer = _json("The answer; a stream of chunks with stream: true.", ChatCompletion)
    answer["content"]["text/event-stream"] = {
        "schema": {  # of an event
            "type": "object",
            "properties": {"data": {"type": "string", "description": "A ChatCompletionChunk, or at last [DONE]."}},
            "required": ["data"],
        }
    }
    header = {
        "name": deadline_header,
        "in": "header",
        "description": "As fusion.deadline_ms; the smaller one counts.",
        "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_DEADLINE_MS},
    }
    operation = _get("Ask a question about a picture.", {200: answer} | _errors(*_ERRORS))
    body = {"required": True, "content": {"application/json": {"schema": _ref(ChatRequest)}}}
    return operation | {"operationId": "createChatCompletion", "parameters": [header], "requestBody": body}


def _model() -> dict[str, Any]:
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return _get("Describe the served model.", {200: _json("The model.", ModelInfo)} | _errors(404)) | {
        "parameters": [parameter]
    }


def _get(summary: str, responses: dict[int, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": {str(status): response for status, response in responses.items()}}


def _statuses(good: str, bad: str) -> dict[int, Any]:
    return {200: _json(good, Status), 503: _json(bad, Status)}


def _errors(*statuses: int) -> dict[int, Any]:
    return {status: _json(_ERRORS[status], ErrorResponse) for status in statuses}


def _json(description: str, kind: type[BaseModel]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(kind)}}}


def _ref(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
