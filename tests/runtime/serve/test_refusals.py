"""Every error before an answer: OpenAI's form, the right status, the field's path, one line."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support.http_servers import MODEL, HttpServer, chat, data_url, user

from fusion_edge.runtime.serve.body import parse_body, parse_json
from fusion_edge.runtime.serve.chat_request import ChatRequest
from fusion_edge.runtime.serve.errors import ApiError

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
MANY = [{"role": "user", "content": "x"}] * 1001

FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "temprature", "is an unknown field; remove it"),
    ({"unknown": None}, "unknown", "is an unknown field"),
    ({"top_k": 3}, "top_k", "is an unknown field"),
    ({"fusion": {"gide": "x"}}, "fusion.gide", "is an unknown field"),
    ({"model": None}, "model", "valid string"),
    ({"model": 3}, "model", "valid string"),
    ({"messages": None}, "messages", "valid list"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": MANY}, "messages", "at most 1000 items"),
    ({"messages": ["x"]}, "messages[0]", "role is system, developer, user or assistant"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "role is system"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "role is system"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing; add it"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "expected a string or a list"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name", "no names"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "type is text or image_url"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
        "type is text or image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        "messages[0].content[0].text",
        "valid string",
    ),
    (
        {"messages": [{"role": "user", "content": [IMAGE | {"image_url": "data:,"}]}]},
        "messages[0].content[0].image_url",
        "expected an object",
    ),
    (
        {"messages": [{"role": "user", "content": [IMAGE | {"image_url": {"url": ""}}]}]},
        "messages[0].content[0].image_url.url",
        "at least 1 character",
    ),
    (
        {"messages": [{"role": "user", "content": [IMAGE | {"image_url": {"url": "data:,", "detail": "best"}}]}]},
        "messages[0].content[0].image_url.detail",
        "'auto', 'low' or 'high'",
    ),
    (
        {"messages": [user(), {"role": "assistant", "content": "x", "tool_calls": [{}]}, user()]},
        "messages[1].tool_calls",
        "calls no tools",
    ),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 1.0}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens", "valid integer"),
    ({"max_completion_tokens": 9}, "max_tokens", "differs from max_completion_tokens"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
    ({"stop": ["a", 3]}, "stop[1]", "valid string"),
    ({"stop": {}}, "stop", "expected a string or a list"),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"n": 2}, "n", "ask again for another answer"),
    ({"n": True}, "n", "ask again"),
    ({"stream": "true"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "padded"),
    ({"response_format": {"type": "xml"}}, "response_format", "type is text, json_object or json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    ({"response_format": SCHEMA_FORMAT}, "response_format.json_schema.schema", "properties is None"),
    ({"response_format": {"type": "json_object"}, "stop": "x"}, "stop", "excludes response_format"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "temperature and top_p; leave it out"),
    ({"frequency_penalty": False}, "frequency_penalty", "leave it out"),
    ({"presence_penalty": -1}, "presence_penalty", "leave it out"),
    ({"logit_bias": {"1": 1}}, "logit_bias", "fusion.choices or response_format"),
    ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
    ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
    ({"functions": [{}]}, "functions", "calls no tools"),
    ({"store": True}, "store", "nothing is stored"),
    ({"service_tier": "flex"}, "service_tier", "one tier"),
    ({"modalities": ["text", "audio"]}, "modalities", "answers with text"),
    ({"user": 3}, "user", "valid string"),
    ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
    ({"fusion": {"choices": ["yes"]}}, "fusion.choices", "at least 2 items"),
    ({"fusion": {"choices": ["yes", "yes"]}}, "max_tokens", "no effect with fusion.choices"),
    ({"fusion": {"choices": ["yes", "yes"]}, "max_tokens": None}, "fusion.choices", "yes"),
    ({"fusion": {"choices": ["a", "b"]}, "max_tokens": None, "response_format": {"type": "json_object"}},
     "response_format", "no effect with fusion.choices"),
    ({"fusion": {"choices": ["a", "b"]}, "max_tokens": None, "temperature": 0}, "temperature", "no effect"),
    ({"fusion": {"detail": 5}}, "fusion.detail", "Query length 5 is not offered; choose from 16, 4"),
    ({"fusion": {"detail": 16}, "messages": [user(detail="low")]}, "fusion.detail", "exclude each other"),
    ({"fusion": {"deadline_ms": 0}}, "fusion.deadline_ms", "greater than or equal to 1"),
    ({"fusion": {"guide": "x" * 100_000}}, "fusion.guide", "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "message"), FIELDS, ids=lambda value: str(value)[:60])
def test_a_field(shared_server: HttpServer, fields: dict[str, Any], param: str, message: str) -> None:
    streams: list[dict[str, Any]] = [{}, {"stream": True}]
    for stream in streams[: 1 + ("stream_options" not in fields)]:
        reply = shared_server.ask(chat() | stream | fields)
        assert reply.status == 400, reply.body
        assert reply.error["param"] == param
        assert message in reply.error["message"]
        assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "user": "me", "store": False, "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0.0},
        {"logit_bias": {}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto"},
        {"logit_bias": None, "tools": None, "stream": False, "modalities": ["text"], "functions": []},
        {"safety_identifier": "x", "prompt_cache_key": "y", "response_format": {"type": "text"}, "logprobs": False},
        dict.fromkeys(set(ChatRequest.model_fields) - {"model", "messages"}),
    ],
)
def test_neutral_values_change_nothing(shared_server: HttpServer, fields: dict[str, Any]) -> None:
    assert shared_server.ask({"max_tokens": 6} | chat() | {"max_tokens": 6} | fields).status == 200


MESSAGES: list[tuple[list[dict[str, Any]], str, str]] = [
    ([user(seed=None)], "messages[0].content", "has no image_url; FUSION answers questions about a picture"),
    ([{"role": "user", "content": "What?"}], "messages[0].content", "has no image_url"),
    ([{"role": "system", "content": ""}], "messages", "no question"),
    ([{"role": "system", "content": "Rhyme."}, user()], "messages[0].content", "one system text"),
    ([user(), {"role": "system", "content": ""}], "messages[1].role", "expected assistant"),
    ([{"role": "assistant", "content": "x"}, user()], "messages[0].role", "expected user"),
    ([user(), user()], "messages[1].role", "is user; expected assistant"),
    ([user(), {"role": "assistant", "content": "x"}], "messages", "end with a question of the user"),
    ([user(), {"role": "assistant", "content": "x"}, user("Where?", 1)],
     "messages[2].content[1].image_url", "start another conversation"),
    ([user(seed=None), {"role": "assistant", "content": "x"}, user("Where?", 1)],
     "messages[2].content[1].image_url", "start another conversation"),
    ([{"role": "user", "content": user()["content"] + user()["content"]}],
     "messages[0].content[3].image_url", "ask about each picture"),
    ([user(" ")], "messages", "The question is empty"),
    ([user("\ud800")], "messages", "Unicode"),
    ([user("x " * 50_000)], "messages", "the context holds 512"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "param", "message"), MESSAGES, ids=lambda value: str(value)[:60])
def test_a_conversation(shared_server: HttpServer, messages: list[Any], param: str, message: str) -> None:
    reply = shared_server.ask(chat(messages=messages))
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param
    assert message in reply.error["message"]


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,", "data:image/png;base64,AAAA", "data:image/png;base64,!!!", "data:image/png,AAAA",
        "data:text/plain;base64,AAAA", "data:", "x", "http://127.0.0.1/x.png", "https://127.0.0.1/x.png",
        "file:///etc/passwd", data_url()[:-400],
    ],
)  # fmt: skip
def test_a_picture(shared_server: HttpServer, url: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE | {"image_url": {"url": url}}]}
    reply = shared_server.ask(chat(messages=[message]))
    assert reply.status == 400, reply.body
    assert reply.error["param"] == "messages[0].content[1].image_url.url"


BODIES = {
    b"": "Expecting value",
    b"{": "Expecting property name",
    b"[]": "The body: ",
    b'"x"': "The body: ",
    b"null": "The body: ",
    b'{"model": "x", "model": "x"}': "the key 'model' is given twice",
    b'{"fusion": {"a": {"b": 1, "b": 1}}}': "the key 'b' is given twice",
    b'{"temperature": NaN}': "NaN is not a JSON number",
    b'{"temperature": -Infinity}': "-Infinity is not a JSON number",
    b'{"seed": ' + b"9" * 5000 + b"}": "a number has 5000 digits",
    b"[" * 9_900 + b"]" * 9_900: "nested too deeply",
    b'{"a":' * 4_900 + b"1" + b"}" * 4_900: "nested too deeply",
    b'{"model": "\xff"}': "byte 11 is not UTF-8",
    b'\xef\xbb\xbf{"model": "x"}': "BOM",
    b"{} {}": "Extra data",
}


@pytest.mark.parametrize(("body", "message"), BODIES.items(), ids=lambda value: str(value)[:30])
def test_a_body(shared_server: HttpServer, body: bytes, message: str) -> None:
    reply = shared_server.ask(body)
    assert reply.status == 400
    assert message in reply.error["message"]
    assert reply.error["param"] is None


def test_an_infinite_number(shared_server: HttpServer) -> None:
    body = json.dumps(chat()).replace('"max_tokens": 6', '"temperature": 1e999').encode()
    assert shared_server.ask(body).error["param"] == "temperature"


def test_names_of_fields_are_shown_in_one_short_line() -> None:
    for name, shown in (("a\nb" + "c" * 1000, r"a\nb" + "c" * 77), ("\ud800", None)):
        with pytest.raises(ApiError) as refused:
            parse_body(json.dumps({name: 1, "model": "x", "messages": []}).encode(), ChatRequest)
        assert refused.value.param == shown
        json.dumps(refused.value.body(), ensure_ascii=False).encode()


def test_numbers_of_json_are_exact() -> None:
    assert parse_json(b'{"a": -1, "b": 0.1, "c": 123456789012345678901234567890}') == {
        "a": -1, "b": 0.1, "c": 123456789012345678901234567890
    }  # fmt: skip


@pytest.mark.parametrize(
    "given", ["", "text/plain", "application/x-www-form-urlencoded", "application/json-patch+json"]
)
def test_a_content_type(shared_server: HttpServer, given: str) -> None:
    reply = shared_server.request("POST", "/v1/chat/completions", b"{}", {"Content-Type": given} if given else {})
    assert reply.status == 415
    assert reply.error["code"] == "unsupported_media_type"
    assert repr(given) in reply.error["message"]


def test_a_content_type_with_a_charset(shared_server: HttpServer) -> None:
    body = json.dumps(chat()).encode()
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert shared_server.request("POST", "/v1/chat/completions", body, headers).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1/completions", 404), ("POST", "/v1/embeddings", 404), ("GET", "/%0a%ff", 404),
        ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/chat/completions", 405), ("POST", "/v1/models", 405),
        ("DELETE", f"/v1/models/{MODEL}", 405), ("POST", "/health", 405), ("GET", "/v1/models/other/x", 404),
    ],
)  # fmt: skip
def test_a_path(shared_server: HttpServer, method: str, path: str, status: int) -> None:
    reply = shared_server.request(method, path)
    assert reply.status == status
    assert reply.error["type"] == "invalid_request_error"
    if status == 405:
        assert re.fullmatch("POST|GET|GET, HEAD|HEAD, GET", reply.headers["allow"])


def test_without_llguidance(shared_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_edge.runtime.serve import question

    monkeypatch.setattr(question, "find_spec", lambda name: None)
    reply = shared_server.ask(chat(response_format={"type": "json_object"}))
    assert reply.status == 501
    assert reply.error["param"] == "response_format"
    assert "pip install '.[constrained]'" in reply.error["message"]
