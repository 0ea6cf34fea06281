"""Bytes behind a request: they hide no disconnect, and the next request is answered."""

from __future__ import annotations

import json
import socket
import statistics
import time

import pytest
from support.http_servers import HttpServer, chat, eventually

GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
EARLY = {
    "a line break": b"\r\n",
    "a request": GET,
    "a head without end": GET[:30],
    "many requests": GET * 500,
    "more than is kept": GET * 5000,
    "no HTTP": bytes(range(256)),
}


def post(*headers: str) -> bytes:
    body = json.dumps(chat(max_tokens=400)).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers)
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("is_together", [True, False])
@pytest.mark.parametrize("header", ["Connection: keep-alive", "Connection: close", "Upgrade: websocket"])
def test_a_disconnect_behind_early_bytes(server: HttpServer, early: str, is_together: bool, header: str) -> None:
    server.fusion.backend.before = lambda name: time.sleep(0.005) if name == "decode" else None  # type: ignore[attr-defined]
    leaving = socket.create_connection(("127.0.0.1", server.port), 20)
    leaving.sendall(post(header) + (EARLY[early] if is_together else b""))
    eventually(lambda: any(request.first_piece is not None for request in server.engine._live))
    if not is_together:
        leaving.sendall(EARLY[early])
        time.sleep(0.02)
        assert server.engine.running() == 1
    begin = time.monotonic()
    leaving.close()
    eventually(lambda: server.engine._taken == 0)
    assert time.monotonic() - begin < 0.5  # of 2 s
    assert server.metric("request_cancelled_total") == 1


def test_a_cancel_behind_early_bytes_comes_within_100_ms(server: HttpServer) -> None:
    server.fusion.backend.before = lambda name: time.sleep(0.005) if name == "decode" else None  # type: ignore[attr-defined]
    taken = []
    for _ in range(7):
        leaving = socket.create_connection(("127.0.0.1", server.port), 20)
        leaving.sendall(post())
        eventually(lambda: server.engine.running() == 1)
        leaving.sendall(b"\r\n")
        time.sleep(0.02)
        begin = time.monotonic()
        leaving.close()
        eventually(lambda: server.engine._taken == 0)
        taken.append(time.monotonic() - begin)
    assert statistics.median(taken) < 0.1


@pytest.mark.parametrize("is_together", [True, False])
def test_a_request_behind_another_one_is_answered(server: HttpServer, is_together: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(post() + (GET if is_together else b""))
        if not is_together:
            eventually(lambda: server.engine._taken == 1)
            connection.sendall(GET)
        received = b""
        while received.count(b"HTTP/1.1 200") < 2 or not received.endswith(b'{"status":"ready"}'):
            part = connection.recv(65536)
            assert part, received
            received += part


def test_an_answer_is_whole_behind_too_many_bytes(server: HttpServer) -> None:
    """They are dropped, and the connection ends with the answer."""
    server.fusion.backend.before = lambda name: time.sleep(0.001) if name == "decode" else None  # type: ignore[attr-defined]
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(post())
        eventually(lambda: server.engine.running() == 1)
        connection.sendall(GET * 5000)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 ") == 1
    assert json.loads(received.partition(b"\r\n\r\n")[2])["choices"][0]["finish_reason"]
