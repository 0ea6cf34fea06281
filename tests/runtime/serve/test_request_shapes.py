"""Requests in the shapes of programs that speak OpenAI's API, replayed.

Open WebUI 0.12: ``routers/openai.py`` and ``utils/payload.py``. aiperf 0.13: ``endpoints/openai_chat.py`` and
``endpoints/base_endpoint.py``. LangChain 1: ``ChatOpenAI._get_request_payload``.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.http_servers import MODEL, HttpServer, data_url, user

IMAGE = {"type": "image_url", "image_url": {"url": data_url()}}
TEXT = {"type": "text", "text": "What?"}

SHAPES: dict[str, dict[str, Any]] = {
    # A chat with an uploaded picture. Open WebUI adds usage where the model's settings ask for it.
    "open-webui": {"stream": True, "model": MODEL, "messages": [{"role": "user", "content": [TEXT, IMAGE]}]},
    "open-webui, usage and parameters": {
        "stream": True, "model": MODEL, "messages": [{"role": "user", "content": [TEXT, IMAGE]}], "temperature": 0.8,
        "top_p": 0.9, "max_tokens": 16, "seed": 3, "stop": ["\n"], "frequency_penalty": 0, "presence_penalty": 0,
        "logit_bias": {}, "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
    },
    "open-webui, second turn": {
        "stream": True, "model": MODEL, "messages": [
            {"role": "user", "content": [TEXT, IMAGE]}, {"role": "assistant", "content": "red"},
            {"role": "user", "content": "Where?"},
        ],
    },
    "aiperf, streaming": {
        "messages": [{"role": "user", "content": [TEXT, IMAGE]}], "model": MODEL, "stream": True,
        "max_completion_tokens": 16, "stream_options": {"include_usage": True},
    },
    "aiperf": {
        "messages": [{"role": "user", "content": [TEXT, IMAGE]}], "model": MODEL, "stream": False,
        "max_completion_tokens": 16,
    },
    "aiperf, legacy limit": {
        "messages": [{"role": "user", "content": [TEXT, IMAGE]}], "model": MODEL, "stream": False, "max_tokens": 16,
    },
    "langchain": {
        "messages": [{"content": [TEXT, IMAGE], "role": "user"}], "model": MODEL, "stream": False, "temperature": 0.0,
        "n": 1, "max_completion_tokens": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_request_is_answered(shared_server: HttpServer, name: str) -> None:
    body = SHAPES[name]
    reply = shared_server.ask(body, Authorization="Bearer unused", Accept="*/*")
    assert reply.status == 200, reply.body
    if not body["stream"]:
        assert reply.json["choices"][0]["message"]["content"]
        return
    events = [event.removeprefix("data: ") for event in reply.body.decode().split("\n\n") if event]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert any(chunk["choices"] and chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert ("usage" in chunks[-1] and not chunks[-1]["choices"]) == ("stream_options" in body)


def test_open_webui_lists_models(shared_server: HttpServer) -> None:
    (model,) = shared_server.request("GET", "/v1/models", headers={"Authorization": "Bearer unused"}).json["data"]
    assert model["id"] == MODEL  # what its menu shows


def test_a_title_without_a_picture_is_refused(shared_server: HttpServer) -> None:
    """Open WebUI asks for titles and tags in requests without a picture; it logs the refusal, and goes on."""
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "### Task:\nGenerate a title."}], "stream": False,
        "max_completion_tokens": 1000,
    }  # fmt: skip
    reply = shared_server.ask(body)
    assert (reply.status, reply.error["code"]) == (400, "missing_image")


def test_what_only_other_servers_take_is_refused_by_name(shared_server: HttpServer) -> None:
    """aiperf's ``--per-chunk-usage`` and its ids of pictures are extensions of vLLM."""
    for fields, param in (
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"messages": [{"role": "user", "content": [IMAGE | {"uuid": "1"}]}]}, "messages[0].content[0].uuid"),
        ({"continue_final_message": True}, "continue_final_message"),
    ):
        reply = shared_server.ask({"model": MODEL, "messages": [user()]} | fields)
        assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, "unknown_field")
