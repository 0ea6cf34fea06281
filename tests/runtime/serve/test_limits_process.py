"""Hostile requests to a real server process: status, and memory."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image
from support.http_servers import eventually
from support.safe_server import Server, code, head, read_all, running, status

from fusion_edge.runtime.serve.limits import RequestLimits
from fusion_edge.runtime.serve.safety import SafetySettings

ALLOWED_GROWTH = 64 << 20
LIMITS = RequestLimits(body_seconds=1.5, head_seconds=1.5, write_seconds=1.5)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(SafetySettings(requests=LIMITS)) as server:
        assert status(server.exchange(head("/v1/size", "Connection: close"))) == 200
        yield server


@pytest.fixture
def flat(server: Server) -> Iterator[Server]:
    """The server, whose peak of memory may not grow by more than the limit."""
    before = server.memory()
    yield server
    print(f"+{(server.memory() - before) / 1e6:.1f} MB")
    assert server.memory() - before <= ALLOWED_GROWTH


def send_while_open(server: Server, data: bytes, part: bytes, count: int, pause: float = 0) -> bytes:
    """Send parts until the server closes; return its answer."""
    with server.connect() as connection:
        connection.sendall(data)
        try:
            for _ in range(count):
                connection.sendall(part)
                time.sleep(pause)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return read_all(connection)


MEGABYTE = bytes(10**6)
CHUNK = b"F4240\r\n" + MEGABYTE + b"\r\n"


def test_a_body_of_100_mb_is_refused_by_its_length(flat: Server) -> None:
    answer = send_while_open(flat, head("/v1/size", "Content-Length: 100000000", method="POST"), MEGABYTE, 100)
    assert (status(answer), code(answer)) == (413, "request_too_large")


def test_a_refusal_does_not_wait_for_the_body(flat: Server) -> None:
    begin = time.monotonic()
    with flat.connect() as connection:
        request = head("/v1/size", "Content-Length: 100000000", "Expect: 100-continue", method="POST")
        connection.sendall(request)
        answer = connection.recv(65536)
        assert time.monotonic() - begin < LIMITS.body_seconds
    assert status(answer) == 413


def test_a_body_of_100_mb_in_chunks_is_refused(flat: Server) -> None:
    answer = send_while_open(flat, head("/v1/size", "Transfer-Encoding: chunked", method="POST"), CHUNK, 100)
    assert (status(answer), code(answer)) == (413, "request_too_large")


def test_eight_bodies_of_100_mb_at_once_are_refused(flat: Server) -> None:
    answers: list[bytes] = []

    def send() -> None:
        answers.append(send_while_open(flat, head("/v1/size", "Transfer-Encoding: chunked", method="POST"), CHUNK, 100))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert {(status(answer), code(answer)) for answer in answers} <= {
        (413, "request_too_large"),
        (429, "too_many_bytes"),
    }


def test_bodies_within_the_limit_arrive_whole(flat: Server) -> None:
    answer = flat.exchange(
        head("/v1/size", "Content-Length: 8000000", "Connection: close", method="POST") + bytes(8000000)
    )
    assert (status(answer), json.loads(answer.partition(b"\r\n\r\n")[2])) == (200, {"bytes": 8000000})
    chunked = (
        head("/v1/size", "Transfer-Encoding: chunked", "Connection: close", method="POST") + CHUNK * 3 + b"0\r\n\r\n"
    )
    assert json.loads(flat.exchange(chunked).partition(b"\r\n\r\n")[2]) == {"bytes": 3 * 10**6}


def test_a_slow_body_times_out(flat: Server) -> None:
    begin = time.monotonic()
    request = head("/v1/size", "Content-Length: 1000", method="POST")
    answer = send_while_open(flat, request, b" ", 40, 0.1)
    assert (status(answer), code(answer)) == (408, "request_timeout")
    assert time.monotonic() - begin < 6


def test_a_slow_head_times_out(flat: Server) -> None:
    begin = time.monotonic()
    answer = send_while_open(flat, b"GET /v1/size HTTP/1.1\r\n", b"a: b\r\n", 40, 0.1)
    assert (status(answer), code(answer)) == (408, "request_timeout")
    assert 1.4 < time.monotonic() - begin < 6


def test_a_slow_head_times_out_on_a_used_connection(flat: Server) -> None:
    with flat.connect() as connection:
        connection.sendall(head("/v1/size"))
        assert status(connection.recv(65536)) == 200
        begin = time.monotonic()
        connection.sendall(b"GET /v1/size HTTP/1.1\r\nHost: local")
        answer = read_all(connection)
    assert status(answer) == 408
    assert 1.4 < time.monotonic() - begin < 6


def test_a_silent_connection_is_closed(flat: Server) -> None:
    begin = time.monotonic()
    assert status(flat.exchange(b"")) == 408
    assert 1.4 < time.monotonic() - begin < 6


def test_10_000_headers_are_refused(flat: Server) -> None:
    answer = flat.exchange(head("/v1/size", *(f"x{number}: y" for number in range(10_000))))
    assert status(answer) == 431
    assert status(flat.exchange(head("/v1/size", *["a:"] * 10_000))) == 431


def test_a_head_without_end_is_refused(flat: Server) -> None:
    answer = send_while_open(flat, b"GET / HTTP/1.1\r\nx: ", b"y" * 65536, 100)
    assert status(answer) == 431


def test_a_long_url_is_refused(flat: Server) -> None:
    answer = flat.exchange(head("/v1/size?" + "x" * 4000))
    assert (status(answer), code(answer)) == (414, "url_too_long")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/size HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
        b"POST /v1/size HTTP/1.1\r\nHost: localhost\r\nContent-Length: -3\r\n\r\nabc",
        b"POST /v1/size HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"POST /v1/size HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /v1/size HTTP/1.1\r\nHost: localhost\r\nx y: z\r\n\r\n",
        b"GET /v1/size HTTP/1.1\r\nHost: localhost\r\n y: z\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(flat: Server, data: bytes) -> None:
    answer = flat.exchange(data)
    assert 400 <= status(answer) <= 501
    assert b'"error"' in answer


def test_a_client_that_does_not_read_is_closed(flat: Server) -> None:
    with flat.connect() as connection:
        connection.sendall(head("/v1/pour"))
        time.sleep(3.5)
        received = read_all(connection)
    assert len(received) < 64 << 20  # what was under way


def test_the_server_answers_while_many_connections_are_slow(flat: Server) -> None:
    slow = [flat.connect() for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/size HTTP/1.1\r\nHost: localhost\r\n")
        begin = time.monotonic()
        assert status(flat.exchange(head("/health", "Connection: close"))) == 200
        assert time.monotonic() - begin < LIMITS.head_seconds
    finally:
        for connection in slow:
            connection.close()


def test_more_connections_than_the_limit_are_closed() -> None:
    with running(SafetySettings(requests=RequestLimits(connections=3))) as server:
        held = [server.connect() for _ in range(3)]
        request = head("/health", "Connection: close")
        eventually(lambda: server.exchange(request) == b"")
        for connection in held:
            connection.close()
        eventually(lambda: server.exchange(request).startswith(b"HTTP/1.1 200"))


# --- Pictures -------------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes) -> bytes:
    """Return a PNG with a true header and any compressed rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """Return ``count`` compressed zero bytes: a thousandth of their size."""
    compressor, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [compressor.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, compressor.flush()])


def gif(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (width, height)).save(buffer, "GIF")
    return buffer.getvalue()


def webp(width: int, height: int) -> bytes:
    """Return a WebP whose frame header claims a size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP")
    data = bytearray(buffer.getvalue())
    data[26:30] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return bytes(data)


def ask(server: Server, picture: bytes) -> bytes:
    body = json.dumps({"url": "data:image/png;base64," + base64.b64encode(picture).decode()}).encode()
    return server.exchange(head("/v1/image", f"Content-Length: {len(body)}", "Connection: close", method="POST") + body)


BOMBS = {
    "claims 65,000 x 65,000 pixels": lambda: png(65_000, 65_000, zeros(1 << 20)),
    "decompresses to 243 MB": lambda: png(9000, 9000, zeros(243 << 20)),
    "more data than its header says": lambda: png(100, 100, zeros(243 << 20)),
    "a GIF of 8,000 x 8,000": lambda: gif(8000, 8000),
    "a WebP of 12,000 x 12,000": lambda: webp(12_000, 12_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_image_bombs_are_refused(flat: Server, name: str) -> None:
    picture = BOMBS[name]()
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(flat, picture))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = (200, None) if name.startswith("more data") else (400, "invalid_image")
    assert len(answers) == 4
    for answer in answers:
        assert (status(answer), None if status(answer) == 200 else code(answer)) == expected
