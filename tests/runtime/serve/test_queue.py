"""The queue: refusals, clients that leave, deadlines, and places that are given back once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from fakes.watched_backend import BlockedCall
from openai import OpenAI, RateLimitError
from support.http_servers import HttpServer, chat, data_url, eventually

from fusion_edge.runtime.serve.images.source import ImageSource, LoadedImage
from fusion_edge.runtime.serve.picture_url import PictureUrl

QUEUE = 2  # of the fixture


@contextmanager
def busy(server: HttpServer) -> Iterator[BlockedCall]:
    """Keep the worker in the vision encoder of a request during the block."""
    call = BlockedCall(server.fusion, "encode")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.ask, chat("Busy?", 99))
        assert call.reached.wait(20)
        try:
            yield call
        finally:
            call.release()
            assert running.result(20).status == 200


def counts(server: HttpServer) -> tuple[int, int]:
    return server.engine.running(), server.engine.waiting()


def idle(server: HttpServer) -> bool:
    return server.engine._taken == 0 and counts(server) == (0, 0)


def test_a_full_queue_refuses(server: HttpServer, client: OpenAI) -> None:
    with ThreadPoolExecutor(QUEUE) as pool, busy(server):
        waiting = [pool.submit(server.ask, chat("What?", seed)) for seed in range(QUEUE)]
        eventually(lambda: counts(server) == (1, QUEUE))
        refused = server.ask(chat())
        assert refused.status == 429
        assert refused.error["code"] == "queue_full"
        assert refused.error["message"].startswith("2 requests wait, the limit of this server; ask again in ")
        assert int(refused.headers["retry-after"]) >= 1
        assert 0 < int(refused.headers["retry-after-ms"]) <= 1000 * int(refused.headers["retry-after"])
        with pytest.raises(RateLimitError, match="2 requests wait"):
            client.chat.completions.create(**chat())
        assert server.metric("num_requests_running") == 1
        assert server.metric("num_requests_waiting") == QUEUE
    assert [reply.result().status for reply in waiting] == [200, 200]
    assert server.metric('request_refused_total{reason="queue_full"}') == 2
    eventually(lambda: idle(server))
    assert server.ask(chat()).status == 200


def test_retry_after_is_the_time_of_what_waits(server: HttpServer) -> None:
    server.engine._seconds.extend([7.0] * 40)
    with ThreadPoolExecutor(QUEUE) as pool, busy(server):
        for seed in range(QUEUE):
            pool.submit(server.ask, chat("What?", seed))
        eventually(lambda: counts(server) == (1, QUEUE))
        headers = server.ask(chat()).headers
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("14", "14000")


def test_a_refused_picture_is_not_decoded(server: HttpServer) -> None:
    damaged = chat()
    damaged["messages"][0]["content"][1]["image_url"]["url"] = "data:image/png;base64,!"
    with ThreadPoolExecutor(QUEUE) as pool, busy(server):
        for seed in range(QUEUE):
            pool.submit(server.ask, chat("What?", seed))
        eventually(lambda: counts(server) == (1, QUEUE))
        assert server.ask(damaged).status == 429
    assert server.ask(damaged).status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue(server: HttpServer, stream: bool) -> None:
    with busy(server):
        leaving = server.send(chat("What?", 1, stream=stream))
        eventually(lambda: server.engine.waiting() == 1 and len(server.engine._live) == 2)
        leaving.close()
        eventually(lambda: server.engine.waiting() == 0)  # while the other one still runs
    eventually(lambda: idle(server))
    assert server.metric("request_cancelled_total") == 1


def slow_decode(server: HttpServer, seconds: float) -> None:
    """Make every decode step slow, and let cancel work between steps."""
    server.fusion.backend.before = lambda name: time.sleep(seconds) if name == "decode" else None  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_answer_is_generated(server: HttpServer, stream: bool) -> None:
    slow_decode(server, 0.005)
    leaving = server.send(chat("What?", 1, stream=stream, max_tokens=400))
    eventually(lambda: any(request.first_piece is not None for request in server.engine._live))
    leaving.close()
    eventually(lambda: idle(server))
    assert server.metric("request_cancelled_total") == 1
    assert 0 < server.metric("generation_tokens_total") < 400


def test_closing_a_stream_of_the_client_cancels(server: HttpServer, client: OpenAI) -> None:
    slow_decode(server, 0.005)
    stream = client.chat.completions.create(**chat(max_tokens=400), stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    eventually(lambda: idle(server))
    assert server.metric("request_cancelled_total") == 1


def test_a_client_that_leaves_before_its_body_is_complete(server: HttpServer) -> None:
    leaving = socket.create_connection(("127.0.0.1", server.port))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    leaving.sendall(head + b"Content-Length: 99\r\n\r\n{")
    leaving.close()
    assert server.ask(chat()).status == 200
    eventually(lambda: idle(server))


def test_a_client_that_does_not_read_keeps_no_place(server: HttpServer) -> None:
    lazy = server.send(chat(stream=True, max_tokens=100))
    eventually(lambda: server.metric('request_success_total{finished_reason="length"}') == 1)
    assert idle(server)
    lazy.close()


def test_many_clients_that_come_and_go(server: HttpServer) -> None:
    """Every request has one answer of its own or a 429, and every place comes back."""
    seeds = range(6)
    expected = {seed: server.ask(chat("What?", seed)).text for seed in seeds}
    statuses: list[int] = []

    def ask(number: int) -> None:
        for turn in range(12):
            seed = (number + turn) % len(seeds)
            if turn % 4 == 3:
                connection = server.send(chat("What?", seed, stream=turn % 8 == 3))
                time.sleep(0.002 * number)
                connection.close()
                continue
            reply = server.ask(chat("What?", seed))
            statuses.append(reply.status)
            if reply.status == 200:
                assert reply.text == expected[seed]
            else:
                assert reply.error["code"] == "queue_full"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert len(statuses) == 8 * 9
    assert set(statuses) == {200, 429}
    eventually(lambda: idle(server))
    answered = sum(status == 200 for status in statuses) + len(seeds)
    assert server.metric('request_success_total{finished_reason="length"}') >= answered


@pytest.mark.parametrize("way", ["field", "header", "both"])
def test_a_deadline_before_the_answer(server: HttpServer, way: str) -> None:
    with busy(server):
        fields: dict[str, Any] = {"fusion": {"deadline_ms": 60_000 if way == "both" else 50}} if way != "header" else {}
        headers = {"X_Request_Deadline_Ms": "50"} if way != "field" else {}
        reply = server.ask(chat(**fields), **headers)  # while the other one still runs
    assert reply.status == 504
    assert reply.error["code"] == "deadline_exceeded"
    assert reply.headers["x-should-retry"] == "false"
    assert server.metric("request_late_total") == 1
    eventually(lambda: idle(server))


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_within_the_answer(server: HttpServer, stream: bool) -> None:
    slow_decode(server, 0.02)
    reply = server.ask(chat(max_tokens=400, stream=stream, fusion={"deadline_ms": 3000}))
    assert reply.status == 200
    if stream:
        events = [event.removeprefix("data: ") for event in reply.body.decode().split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        choice = json.loads(events[-3])["choices"][0]
    else:
        choice = reply.json["choices"][0]
        assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert choice["fusion"] == {"finish_reason": "deadline"}


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "99999999999", "86400001", "²"])
def test_a_wrong_deadline_header(server: HttpServer, value: str) -> None:
    body = json.dumps(chat()).encode()
    headers = {"Content-Type": "application/json", "X-Request-Deadline-Ms": value}
    reply = server.request("POST", "/v1/chat/completions", body, headers)
    assert reply.status == 400
    assert reply.error["param"] == "X-Request-Deadline-Ms"


def test_an_error_of_the_model(server: HttpServer) -> None:
    from fusion_edge.runtime import FusionError

    def fail(name: str) -> None:
        if name == "prefill":
            raise FusionError("The model overflows.")

    server.fusion.backend.before = fail  # type: ignore[attr-defined]
    reply = server.ask(chat(stream=True))
    assert reply.status == 500  # not yet sent, although it streams
    assert (reply.error["message"], reply.error["type"]) == ("The model overflows.", "server_error")
    assert server.metric("request_failed_total") == 1
    eventually(lambda: idle(server))


@pytest.mark.parametrize("defect", [False, True])
def test_an_error_within_a_stream_is_an_event(server: HttpServer, defect: bool) -> None:
    from fusion_edge.runtime import FusionError

    steps = iter(range(100))

    def fail(name: str) -> None:
        if name == "decode" and next(steps) == 30:
            raise ValueError("secret") if defect else FusionError("The model overflows.")

    server.fusion.backend.before = fail  # type: ignore[attr-defined]
    reply = server.ask(chat(stream=True, max_tokens=100))
    assert reply.status == 200
    events = reply.body.decode().split("\n\n")
    assert events[-1] == ""
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert error["message"] == ("The server failed; see its messages." if defect else "The model overflows.")
    assert b"secret" not in reply.body
    assert b"[DONE]" not in reply.body
    with OpenAI(base_url=server.url, api_key="unused", max_retries=0) as client:
        assert client.chat.completions.create(**chat()).choices  # the next one is answered


def test_the_picture_of_a_follow_up_question_is_not_encoded_again(server: HttpServer) -> None:
    calls: list[str] = []
    server.fusion.backend.before = calls.append  # type: ignore[attr-defined]
    server.ask(chat("What?", 1))
    first = calls.count("encode")
    server.ask(chat("Where?", 1))
    assert (first, calls.count("encode")) == (2, 3)  # global crops and local crop; then only the guided local crop
    server.ask(chat("Where?", 2))
    assert calls.count("encode") == 5
    assert server.metric("image_cache_queries_total") == 3
    assert server.metric("image_cache_hits_total") == 1


def test_a_picture_that_was_sent_before_is_not_decoded_again(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion_edge.runtime.serve import pictures

    monkeypatch.setattr(pictures, "CACHED_CROPS", 2)
    decoded: list[str] = []
    load = ImageSource.load

    async def watched(source: ImageSource, url: PictureUrl, param: str) -> LoadedImage:
        decoded.append(url.text())
        return await load(source, url, param)

    monkeypatch.setattr(ImageSource, "load", watched)
    for seed in (1, 2, 1, 3, 4, 1):
        assert server.ask(chat("What?", seed)).status == 200
    assert [url for url in decoded if url == data_url(1)] == [data_url(1)] * 2  # again once it was evicted
    assert len(decoded) == 5


def test_the_loop_answers_while_the_model_runs(server: HttpServer) -> None:
    with busy(server):
        assert server.get("/health").json == {"status": "ready"}
        assert server.get("/v1/models").status == 200
