"""Limits of requests, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from support.asgi import call

from fusion_edge.runtime.serve.limits import LimitRequests, RequestLimits

LIMITS = RequestLimits(body_bytes=100, receiving_bytes=150, body_seconds=0.2, url_bytes=30, headers=5, header_bytes=60)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = await Request(scope, receive).body()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


LIMITED = LimitRequests(echo, LIMITS)


def error(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str | None]:
    status, headers, body = answer
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)
    code: str | None = json.loads(body)["error"]["code"]
    return status, code


@given(st.lists(st.binary(max_size=30), max_size=6))
def test_bodies_arrive_whole_or_are_refused(parts: list[bytes]) -> None:
    body = b"".join(parts)
    answer = call(LIMITED, "POST", "/", {}, *parts)
    if len(body) <= LIMITS.body_bytes:
        assert answer == (200, {}, body)
    else:
        assert error(answer) == (413, "request_too_large")


def test_lengths() -> None:
    assert call(LIMITED, "POST", "/", {"content-length": "100"}, b"x" * 100)[0] == 200
    assert error(call(LIMITED, "POST", "/", {"content-length": "101"})) == (413, "request_too_large")
    for wrong in ("-1", "1e2", "", "9" * 25, "5, 5"):
        assert error(call(LIMITED, "POST", "/", {"content-length": wrong})) == (400, None)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "TRACE"])
def test_only_the_body_of_a_post_is_read(method: str) -> None:
    assert call(LIMITED, method, "/health", {"content-length": "1"}, b"x") == (200, {}, b"")


def test_urls() -> None:
    assert call(LIMITED, "GET", "/" + "x" * 29, {})[0] == 200
    assert error(call(LIMITED, "GET", "/" + "x" * 30, {})) == (414, "url_too_long")
    assert error(call(LIMITED, "GET", "/x?" + "x" * 29, {})) == (414, "url_too_long")


def test_headers() -> None:
    assert call(LIMITED, "GET", "/", {}, raw=[(b"a", b"")] * 5)[0] == 200
    assert error(call(LIMITED, "GET", "/", {}, raw=[(b"a", b"")] * 6)) == (431, "headers_too_large")
    assert call(LIMITED, "GET", "/", {"a": "x" * 59})[0] == 200
    assert error(call(LIMITED, "GET", "/", {"a": "x" * 60})) == (431, "headers_too_large")


def test_bodies_share_a_limit_until_they_are_complete() -> None:
    """The second body of 100 bytes exceeds 150; once the first is complete, it has room."""

    async def main() -> list[list[dict[str, Any]]]:
        app = LimitRequests(echo, LIMITS)
        gate = asyncio.Event()

        async def ask(wait: bool) -> list[dict[str, Any]]:
            sent: list[dict[str, Any]] = []
            parts = [b"x" * 90, b"x" * 10]

            async def receive() -> dict[str, Any]:
                if len(parts) == 1 and wait:
                    await gate.wait()
                if not parts:
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "path": "/", "query_string": b"", "headers": [], "method": "POST"}
            await app(scope, receive, send)
            return sent

        first = asyncio.create_task(ask(True))
        await asyncio.sleep(0)
        refused = await ask(False)
        gate.set()
        return [await first, refused, await ask(False)]

    first, refused, third = asyncio.run(main())
    assert (first[0]["status"], refused[0]["status"], third[0]["status"]) == (200, 429, 200)
    assert (b"retry-after", b"1") in refused[0]["headers"]


def test_a_slow_body() -> None:
    async def main() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/", "query_string": b"", "headers": [], "method": "POST"}
        await asyncio.wait_for(LIMITED(scope, receive, send), 5)
        return sent

    sent = asyncio.run(main())
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"
    assert sent[-1]["more_body"] is False


def test_a_client_that_leaves_starts_nothing() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the application ran")

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("something was sent")

    scope = {"type": "http", "path": "/", "query_string": b"", "headers": [], "method": "POST"}
    asyncio.run(LimitRequests(application, LIMITS)(scope, receive, send))


def test_the_application_sees_the_client_leave() -> None:
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    call(LimitRequests(application, LIMITS), "POST", "/", {}, b"x", b"y")
    assert seen == ["http.request", "http.disconnect"]


def test_a_body_counts_until_the_application_has_parsed_it() -> None:
    async def main() -> tuple[list[int], list[int]]:
        statuses: list[int] = []
        is_parsed, may_end = asyncio.Event(), asyncio.Event()

        async def application(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await is_parsed.wait()
            await receive()  # waits for the client to leave
            await may_end.wait()
            await echo(scope, receive, send)

        limited = LimitRequests(application, LIMITS)

        async def request() -> None:
            messages = iter([{"type": "http.request", "body": b"x" * 100}])

            async def receive() -> dict[str, Any]:
                return next(messages, {"type": "http.disconnect"})

            async def send(message: Any) -> None:
                statuses.append(message.get("status", 0))

            scope = {"type": "http", "path": "/", "query_string": b"", "headers": [], "method": "POST"}
            await limited(scope, receive, send)

        first = asyncio.create_task(request())
        await asyncio.sleep(0.01)
        await request()  # two bodies are over the limit of 150 bytes
        refused = statuses.copy()
        is_parsed.set()
        await asyncio.sleep(0.01)
        statuses.clear()
        second = asyncio.create_task(request())
        may_end.set()
        await asyncio.gather(first, second, return_exceptions=True)
        return refused, statuses

    refused, later = asyncio.run(main())
    assert refused[0] == 429
    assert 429 not in later


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_scopes_pass(kind: str) -> None:
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(LimitRequests(application, LIMITS)({"type": kind}, None, None))  # type: ignore[arg-type]
    assert seen == [kind]
