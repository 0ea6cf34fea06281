"""Bodies that take much of a parser, and the picture's URL, which no parser sees."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from fakes.watched_backend import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.asgi import call
from support.http_servers import HttpServer, chat, eventually

from fusion_edge.runtime.serve import chat as chats
from fusion_edge.runtime.serve.body import MAX_PUNCTUATION, parse_body, parse_json
from fusion_edge.runtime.serve.chat_request import MAX_PARTS, ChatRequest
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.images import https
from fusion_edge.runtime.serve.limits import HeldBody, LimitRequests, RequestLimits
from fusion_edge.runtime.serve.middleware import middleware
from fusion_edge.runtime.serve.picture_url import PLACEHOLDER, PictureUrl, cut_url
from fusion_edge.runtime.serve.reply import Reply
from fusion_edge.runtime.serve.safety import SafetySettings
from fusion_edge.runtime.serve.token_logprobs import LogprobWriter

TEXT_LENGTH = 2 << 20


def refused(call: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert "\n" not in caught.value.message
    return caught.value


def test_a_repeated_key_is_found_in_linear_time() -> None:
    keys = [f'"{number}":1' for number in range(MAX_PUNCTUATION // 2 - 1)]
    begin = time.process_time()
    error = refused(lambda: parse_json(("{" + ",".join([*keys, keys[-1]]) + "}").encode()))
    assert time.process_time() - begin < 0.25  # of the order of a second in quadratic time
    assert f"the key '{len(keys) - 1}' is given twice" in error.message


@pytest.mark.parametrize("character", list(",:[{"))
def test_the_limit_of_punctuation_is_exact(character: str) -> None:
    assert parse_json(json.dumps(character * MAX_PUNCTUATION).encode()) == character * MAX_PUNCTUATION
    error = refused(lambda: parse_json(json.dumps(character * (MAX_PUNCTUATION + 1)).encode()))
    assert (error.status, error.code) == (413, "too_many_values")


def test_the_first_invalid_part_ends_the_validation() -> None:
    parts = [{"type": "text", "text": number} for number in range(MAX_PARTS)]
    body = {"model": "x", "messages": [{"role": "user", "content": parts}] * 3}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (pydantic's error is one)
        ChatRequest.model_validate(body)
    assert caught.value.error_count() == 1  # type: ignore[attr-defined]


def test_the_limit_of_parts() -> None:
    parts = [{"type": "text", "text": ""}] * (MAX_PARTS + 1)
    body = {"model": "x", "messages": [{"role": "user", "content": parts}]}
    error = refused(lambda: parse_body(json.dumps(body).encode(), ChatRequest))
    assert (error.status, error.param, error.code) == (400, "messages[0].content", "invalid_value")


@pytest.mark.parametrize("number", ["1" * 401, "0." + "1" * 400, "1" * 401 + ".5"])
def test_numbers_of_many_digits(number: str) -> None:
    assert "digits" in refused(lambda: parse_json(number.encode())).message


# --- The picture's URL ----------------------------------------------------------------------------

URL = "data:image/png;base64," + "A" * TEXT_LENGTH


def body(url: str, text: str = "What?", **options: Any) -> bytes:
    part = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [{"type": "text", "text": text}, part]}
    return json.dumps({"model": "x", "messages": [message]}, **options).encode()


@given(st.text(max_size=50), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_a_long_url_is_cut(text: str, indent: int | str | None, ascii_only: bool) -> None:
    given = body(URL, text, indent=indent, ensure_ascii=ascii_only, separators=None) if ascii_only else body(URL)
    rest, url = cut_url(given)
    assert url is not None
    assert url.is_data
    assert url.text() == URL
    assert json.loads(rest) == json.loads(given.replace(URL.encode(), PLACEHOLDER.encode()))


def test_escaped_slashes_are_read() -> None:
    _, url = cut_url(body(URL.replace("AAAA", "/+/A")).replace(b"/", b"\\/"))
    assert url is not None
    assert url.text() == URL.replace("AAAA", "/+/A")


def test_a_small_body_is_whole() -> None:
    small = body("data:image/png;base64,AAAA")
    assert cut_url(small) == (small, None)


@pytest.mark.parametrize(
    "large",
    [
        body("https://example.com/" + "a" * TEXT_LENGTH),
        body("data:image/png;base64,AAAA", "a" * TEXT_LENGTH),
        body(URL, "a" * (1 << 20)),
        json.dumps({"x": URL}).encode(),
        json.dumps({"x": f'"url": "{URL}'}).encode(),
        b" " * (TEXT_LENGTH + 1),
        b'"' * (TEXT_LENGTH + 1),
    ],
    ids=lambda value: str(value[:40]),
)
def test_a_large_body_without_a_picture_is_refused(large: bytes) -> None:
    error = refused(lambda: cut_url(large))
    assert (error.status, error.code) == (413, "request_too_large")


def test_a_url_is_dropped_once_it_is_taken() -> None:
    url = PictureUrl("data:x")
    assert bytes(url.take()) == b"data:x"
    assert url.text() == ""


def large_picture(seed: int) -> str:
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue().ljust(TEXT_LENGTH, b"\0")).decode()


def test_a_large_picture_is_answered_as_a_small_one(server: HttpServer) -> None:
    small, large = chat(seed=1), chat(seed=1)
    large["messages"][0]["content"][1]["image_url"]["url"] = large_picture(1)
    for stream in (False, True):
        assert server.ask(large | {"stream": stream}).status == 200
    assert server.ask(large).text == server.ask(small).text


def test_a_large_url_that_is_not_the_pictures(server: HttpServer) -> None:
    asked = chat(response_format={
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"const": {"url": URL}}}
    })  # fmt: skip
    reply = server.ask(asked)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")


def test_the_picture_is_dropped_before_the_answer(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[weakref.ref[ChatRequest]] = []

    def watched(data: bytes, kind: type[ChatRequest]) -> ChatRequest:
        requests.append(weakref.ref(request := parse_body(data, kind)))
        return request

    monkeypatch.setattr(chats, "parse_body", watched)
    may_run, runs = threading.Event(), threading.Event()

    def block(name: str) -> None:
        runs.set()
        assert may_run.wait(20)

    server.fusion.backend.before = block  # type: ignore[attr-defined]
    asked = server.send(chat())
    assert runs.wait(20)

    def is_dropped() -> bool:
        gc.collect()
        return requests[0]() is None

    eventually(is_dropped)
    may_run.set()
    assert asked.recv(100).startswith(b"HTTP/1.1 200")
    asked.close()


def test_a_body_counts_until_it_is_released() -> None:
    held: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def main() -> None:
        body = HeldBody(bytes(100), receive, held.append)
        await body()
        assert (await body())["type"] == "http.disconnect"
        assert sum(held) == 100
        body.release()
        assert sum(held) == 0
        unread = HeldBody(bytes(100), receive, held.append)
        unread.release()
        assert (await unread())["type"] == "http.disconnect"  # it is dropped

    asyncio.run(main())


# --- The event loop -------------------------------------------------------------------------------


def test_log_probabilities_are_written_in_a_thread(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    write = LogprobWriter.write

    def watched(writer: LogprobWriter, *arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return write(writer, *arguments)

    monkeypatch.setattr(LogprobWriter, "write", watched)
    for stream in (False, True):
        assert server.ask(chat(logprobs=True, top_logprobs=3, stream=stream)).status == 200
    assert len(threads) == 2
    assert "server" not in threads


def test_answers_without_log_probabilities_need_no_thread(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    completion = Reply.completion

    def watched(reply: Reply, result: Any) -> Any:
        threads.append(threading.current_thread().name)
        return completion(reply, result)

    monkeypatch.setattr(Reply, "completion", watched)
    assert server.ask(chat()).status == 200
    assert threads == ["server"]


def test_certificates_are_read_once_and_not_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[str] = []
    create = ssl.create_default_context

    def watched() -> ssl.SSLContext:
        created.append(threading.current_thread().name)
        return create()

    https._tls.cache_clear()
    monkeypatch.setattr(ssl, "create_default_context", watched)
    monkeypatch.setattr(https, "PORT", 1)

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await https.connect("127.0.0.1", "localhost")

    asyncio.run(main())
    assert len(created) == 1
    assert created != [threading.current_thread().name]


# --- Headers of errors ----------------------------------------------------------------------------


def test_errors_have_an_id_of_their_request(server: HttpServer) -> None:
    replies = [
        server.ask(b"{"), server.ask(chat(n=2)), server.get("/nothing"), server.request("PUT", "/health"),
        server.request("POST", "/v1/chat/completions", b"{}"), server.request("GET", "/" + "x" * 3000),
    ]  # fmt: skip
    assert all(reply.status >= 400 for reply in replies)
    ids = {reply.headers["x-request-id"] for reply in replies}
    assert len(ids) == len(replies)


def test_pages_can_read_the_headers_of_errors() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    wrapped: Any = app
    for layer in reversed(middleware(SafetySettings(origins=("https://chat.example",)))):
        wrapped = layer.cls(wrapped, *layer.args, **layer.kwargs)
    _, headers, _ = call(wrapped, "GET", "/", {"Host": "localhost", "Origin": "https://chat.example"})
    exposed = {name.strip() for name in headers["access-control-expose-headers"].split(",")}
    assert exposed == {"Retry-After", "Retry-After-Ms", "X-Request-Id", "X-Should-Retry"}


def test_a_body_of_single_bytes_is_small_in_memory() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        sizes.append(len((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sizes: list[int] = []
    call(LimitRequests(app, RequestLimits()), "POST", "/", {}, *[b"x"] * 1000)
    assert sizes == [1000]
