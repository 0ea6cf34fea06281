"""Before a request is queued: its deadline, its client, its place and its threads."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes.watched_backend import watched_fusion
from support.http_servers import HttpServer, chat, eventually, http_server, user

from fusion_edge.runtime.images import encoded
from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.serve import chat as chats
from fusion_edge.runtime.serve import pictures, question
from fusion_edge.runtime.serve.chat_request import ChatRequest
from fusion_edge.runtime.serve.conversation import read_dialogue
from fusion_edge.runtime.serve.images import source
from fusion_edge.runtime.serve.limits import RequestLimits
from fusion_edge.runtime.serve.picture_url import PictureUrl
from fusion_edge.runtime.serve.safety import SafetySettings

QUEUE = 2  # of the fixture
WAITS: dict[str, tuple[Any, str]] = {
    "decoding": (source, "decode"),
    "cutting": (encoded, "cut_crops"),
    "the digest": (PictureUrl, "digest"),
    "tokenizing": (chats, "prepare"),
}
"""Module or class, and function of each kind of work."""
THREADS = {"decoding": 1, "cutting": 1, "the digest": 2, "tokenizing": 2}


@contextmanager
def blocked(patch: pytest.MonkeyPatch, module: Any, name: str) -> Iterator[Callable[[], int]]:
    """Have a function of a module wait until the end of the block. Yields how many calls have begun."""
    call, may_run, begun = getattr(module, name), threading.Event(), []

    def wait(*arguments: Any) -> Any:
        begun.append(1)
        assert may_run.wait(20)
        return call(*arguments)

    patch.setattr(module, name, wait)
    patch.setattr(pictures, "_SMALL_URL", 0)  # all work in threads, as that of large requests
    patch.setattr(chats, "is_short", lambda *_: False)
    try:
        yield lambda: len(begun)
    finally:
        may_run.set()


def idle(server: HttpServer) -> bool:
    return server.engine._taken == 0 and (server.engine.running(), server.engine.waiting()) == (0, 0)


@pytest.mark.parametrize("work", WAITS)
@pytest.mark.parametrize("way", ["field", "header"])
def test_a_deadline_while_a_request_is_prepared(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, work: str, way: str
) -> None:
    with blocked(monkeypatch, *WAITS[work]):
        begin = time.monotonic()
        fields: dict[str, Any] = {"fusion": {"deadline_ms": 200}} if way == "field" else {}
        reply = server.ask(chat(**fields), **({"X_Request_Deadline_Ms": "200"} if way == "header" else {}))
        assert 0.2 <= time.monotonic() - begin < 2
        assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
        assert reply.headers["x-should-retry"] == "false"
        assert server.engine._taken == 1  # the thread goes on
    eventually(lambda: idle(server))
    assert server.metric("request_late_total") == 1
    assert server.metric("request_cancelled_total") == 0
    assert server.ask(chat(fusion={"deadline_ms": 20_000})).status == 200


def test_a_deadline_while_a_host_is_slow(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def load(*_: object) -> None:
        await asyncio.sleep(20)

    monkeypatch.setattr(source.ImageSource, "load", load)
    begin = time.monotonic()
    assert server.ask(chat(fusion={"deadline_ms": 200})).status == 504
    assert time.monotonic() - begin < 2
    eventually(lambda: idle(server), 2)  # nothing of it goes on


def test_a_deadline_while_the_body_arrives(server: HttpServer) -> None:
    body = json.dumps(chat(fusion={"deadline_ms": 100})).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 20) as slow:
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:100])
        time.sleep(0.3)
        slow.sendall(body[100:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 504 ")
    assert server.metric("request_late_total") == 1
    assert server.metric("prompt_tokens_total") == 0
    eventually(lambda: idle(server))


@pytest.mark.parametrize("work", WAITS)
def test_a_client_that_leaves_keeps_its_place_until_its_thread_ends(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    threads = THREADS[work]
    with blocked(monkeypatch, *WAITS[work]) as begun:
        leaving = []
        for seed in range(QUEUE + 1):
            leaving.append(server.send(chat("What?", seed)))
            eventually(lambda seed=seed: begun() == min(seed + 1, threads))  # type: ignore[misc]
        eventually(lambda: server.engine._taken == QUEUE + 1)
        assert server.ask(chat()).error["code"] == "queue_full"
        for connection in leaving:
            connection.close()
        eventually(lambda: server.metric("request_cancelled_total") == 3)
        eventually(lambda: server.engine._taken == threads, 2)  # the others had no thread
        assert begun() == threads
        for _ in range(20):  # those who leave again and again pass no limit
            with server.send(chat("What?", 3)):
                time.sleep(0.005)
        eventually(lambda: server.engine._taken == threads, 2)
        assert begun() == threads
    eventually(lambda: idle(server))
    assert server.metric("prompt_tokens_total") == 0  # none was asked
    assert server.ask(chat()).status == 200


@pytest.mark.parametrize("work", WAITS)
def test_slow_preparations_delay_no_refusal(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Not of a body that a thread parses, either."""
    large = chat()
    large["messages"][0]["content"][1]["image_url"]["url"] += "A" * (1 << 20)
    with http_server(lambda: watched_fusion(tiny_bundle), monkeypatch, queue=8) as server:
        eventually(lambda: server.engine.loaded.done())
        with ThreadPoolExecutor(9) as pool, blocked(monkeypatch, *WAITS[work]):
            asked = [pool.submit(server.ask, chat("What?", seed)) for seed in range(9)]
            eventually(lambda: server.engine._taken == 9)
            begin = time.monotonic()
            assert server.ask(large).status == 429
            assert time.monotonic() - begin < 1
        assert {reply.result().status for reply in asked} == {200}


def test_what_the_loop_parses_at_once() -> None:
    before, behind = json.dumps(chat()).encode().split(b"base64,")
    assert chats.is_fast(b"[" * (16 << 10))
    for picture, is_fast in {
        b"": True,
        b"A" * (400 << 10): True,
        b"A" * (512 << 10): False,
        b"A" * (200 << 10) + b"\\u0041" + b"A" * (200 << 10): False,
        b'",' * (100 << 10): False,
    }.items():
        assert chats.is_fast(before + b"base64," + picture + behind) == is_fast
        assert not chats.is_fast(b"[" * (64 << 10) + before + b"base64," + picture + behind)
    assert not chats.is_fast(b"[" * (65 << 10))
    assert not chats.is_fast(b"base64," + b"[" * (65 << 10))  # no end of the text


@pytest.mark.parametrize(
    ("fields", "is_short"),
    [
        ({}, True),
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({"fusion": {"choices": ["yes", "no"]}}, False),
        ({"fusion": {"guide": "x" * 900}}, True),
        ({"fusion": {"guide": "x" * 1000}}, False),
        ({"question": "x" * 1001}, False),
        ({"answer": "x" * 1001}, False),
    ],
)
def test_what_the_loop_tokenizes_at_once(fields: dict[str, Any], is_short: bool) -> None:
    body = chat(fields.pop("question", "What?"))
    if "answer" in fields:
        body["messages"] += [{"role": "assistant", "content": fields.pop("answer")}, user("Why?", None)]
    request = ChatRequest.model_validate(body | fields)
    assert question.is_short(request, read_dialogue(request.messages, "")) == is_short


def test_metrics_count_from_the_arrival(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(image: Any) -> Any:
        time.sleep(0.4)
        return cut_crops(image)

    monkeypatch.setattr(encoded, "cut_crops", slow)
    assert server.ask(chat()).status == 200
    eventually(lambda: idle(server))
    first, total, waited = (
        server.metric(f"{name}_seconds_sum")
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time")
    )
    assert 0.4 <= waited <= first <= total
    assert 0.4 <= server.metric('stage_seconds_sum{stage="preprocess"}') <= waited
    assert server.metric('stage_seconds_sum{stage="decode"}') < 0.4


def test_bodies_that_find_no_memory_are_counted(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safety = SafetySettings(requests=RequestLimits(receiving_bytes=100))
    with http_server(lambda: watched_fusion(tiny_bundle), monkeypatch, safety=safety) as server:
        assert server.metric('request_refused_total{reason="too_many_bytes"}') == 0
        reply = server.ask(chat())
        assert (reply.status, reply.error["code"]) == (429, "too_many_bytes")
        assert server.metric('request_refused_total{reason="too_many_bytes"}') == 1
