"""Hostile requests to ``fusion-serve``: status, memory, and whether it answers others meanwhile."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image
from support.http_servers import chat
from support.serve_process import serve_process

from fusion_edge.runtime.serve.body import MAX_PUNCTUATION
from fusion_edge.runtime.serve.chat_request import MAX_PARTS
from fusion_edge.runtime.serve.pictures import CACHED_CROPS

ALLOWED_GROWTH = 64 << 20
LONGEST_SILENCE = 1.0
"""Seconds of a probe, on a machine that does other work, too."""
WHOLE_SIZE = (4096, 3072)
"""The most pixels that a picture may have."""
MAX_FILE = 12 << 20
CLIENTS = 9
"""At once: one is answered, and eight wait."""

Answer = tuple[int, str | None]
"""Status, and code of an error."""
CLOSED: Answer = (0, None)


@dataclass
class ServerProcess:
    """A running ``fusion-serve``."""

    pid: int
    port: int
    name: str
    usual: int = 0
    """Peak of memory of usual requests, in bytes."""
    allowed: int = ALLOWED_GROWTH
    """Bytes of memory above it."""

    def memory(self, row: str) -> int:
        """Return a row of the process's status in bytes."""
        found = re.search(rf"{row}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) << 10

    def reset_peak(self) -> None:
        """Let the peak, ``VmHWM``, begin at the present memory."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def ask(self, body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            with suppress(ConnectionError):  # a refusal does not wait for the whole body
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            return response.status, answer["error"]["code"] if "error" in answer else None
        except (ConnectionError, http.client.HTTPException):  # closed, with bytes unread
            return CLOSED
        finally:
            connection.close()

    def picture(self, data: bytes, kind: str = "png") -> bytes:
        """Return a question about a picture."""
        url = f"data:image/{kind};base64," + base64.b64encode(data).decode()
        part = {"type": "image_url", "image_url": {"url": url}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]
        return json.dumps({"model": self.name, "messages": messages, "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def process(tiny_bundle: Path) -> Iterator[ServerProcess]:
    with serve_process(tiny_bundle, "--model-name", "tiny", "--device", "cpu") as (running, url):
        server = ServerProcess(running.pid, int(url.rpartition(":")[2].removesuffix("/v1")), "tiny")
        usual = [json.dumps(chat(seed=seed)).encode() for seed in range(2 * CACHED_CROPS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            assert set(pool.map(server.ask, usual)) == {(200, None)}
        server.usual = server.memory("VmHWM")
        yield server


@pytest.fixture
def server(process: ServerProcess) -> Iterator[ServerProcess]:
    """The server, which answers probes, and whose memory may not grow by more than the limit."""
    with probed(process) as silences:
        process.reset_peak()
        process.allowed = ALLOWED_GROWTH
        yield process
        growth = process.memory("VmHWM") - process.usual
    print(f"+{growth / 1e6:.1f} MB, silent for {max(silences):.3f} s")
    assert growth <= process.allowed
    assert max(silences) < LONGEST_SILENCE


@contextmanager
def probed(server: ServerProcess) -> Iterator[list[float]]:
    """Ask ``/health`` all the time. Yields the seconds of each answer."""
    silences: list[float] = []
    is_over = threading.Event()

    def probe() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        while not is_over.wait(0.005):
            begin = time.monotonic()
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b'{"status":"ready"}')
            silences.append(time.monotonic() - begin)
        connection.close()

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield silences
    finally:
        is_over.set()
        thread.join()


def message(content: str) -> str:
    return f'{{"model": "tiny", "messages": [{{"role": "user", "content": {content}}}]}}'


MANY: dict[str, Callable[[], str]] = {
    "keys": lambda: "{" + ",".join(f'"k{number}": 1' for number in range(300_000)) + "}",
    "repeated keys": lambda: "{" + ",".join(['"a":1'] * 500_000) + "}",
    "numbers as parts": lambda: message("[" + ",".join("1" * 1_000_000) + "]"),
    "empty lists": lambda: '{"x": [' + ",".join(["[]"] * 1_000_000) + "]}",
    "empty objects": lambda: '{"x": [' + ",".join(["{}"] * 1_000_000) + "]}",
    "nested lists": lambda: "[" * 2_000_000,
    "commas": lambda: "," * (17 << 20),
}


@pytest.mark.parametrize("name", MANY)
def test_many_values(server: ServerProcess, name: str) -> None:
    assert server.ask(MANY[name]().encode())[0] == 413


HALF = MAX_PUNCTUATION // 2 - 10
FEW: dict[str, tuple[str, str]] = {
    "repeated keys": ("{" + ",".join(['"a":1'] * HALF) + "}", "invalid_json"),
    "the last key repeated": (
        "{" + ",".join(f'"{number % (HALF - 1)}":1' for number in range(HALF)) + "}", "invalid_json",
    ),
    "unknown keys": ("{" + ",".join(f'"k{number}":1' for number in range(HALF)) + "}", "invalid_value"),
    "numbers as parts": (message("[" + ",".join("1" * (2 * HALF)) + "]"), "invalid_value"),
    "more parts than the limit": (
        message(json.dumps([{"type": "text", "text": ""}] * (MAX_PARTS + 1))), "invalid_value",
    ),
    "numbers as messages": ('{"messages": [' + ",".join("1" * (2 * HALF)) + "]}", "invalid_value"),
    "numbers as choices": ('{"fusion": {"choices": [' + ",".join("1" * (2 * HALF)) + "]}}", "invalid_value"),
    "numbers as metadata": (
        '{"metadata": {' + ",".join(f'"k{number}":1' for number in range(HALF)) + "}}", "invalid_value",
    ),
    "nested lists": ("[" * HALF + "]" * HALF, "invalid_json"),
    "a number of many digits": ('{"temperature": 0.' + "1" * 2_000_000 + "}", "invalid_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_as_many_values_as_are_parsed(server: ServerProcess, name: str) -> None:
    body, code = FEW[name]
    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.ask, [body.encode()] * 8))
    assert set(answers) <= {(400, code), (400, "invalid_json"), (400, "missing_field")}
    assert time.monotonic() - begin < 8 * LONGEST_SILENCE


@pytest.mark.parametrize("character", ["a", "é", "\N{GRINNING FACE}", "\\n", "\\u4e00"])
def test_long_texts(server: ServerProcess, character: str) -> None:
    """One character outside of ASCII makes Python's text of a body two or four times as large."""
    text = '"a' + character + "b" * (16 << 20) + '"'
    assert server.ask(message(text).encode()) == (413, "request_too_large")
    text = '"' + character * (1_900_000 // len(character.encode())) + '"'
    assert server.ask(message(text).encode())[0] == 400


# --- Pictures -------------------------------------------------------------------------------------


def png(width: int, height: int, color_type: int, compressed: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, color_type, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def transparent(noise: int = 0) -> bytes:
    """Return a PNG of :data:`WHOLE_SIZE` with alpha, which has about ``noise`` bytes that cannot be compressed."""
    width, height = WHOLE_SIZE
    compressor = zlib.compressobj(1)
    rows = noise // (4 * width)
    parts = [compressor.compress(b"\0" + os.urandom(4 * width)) for _ in range(rows)]
    parts += [compressor.compress(bytes(4 * width + 1)) for _ in range(height - rows)]
    return png(width, height, 6, b"".join([*parts, compressor.flush()]))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


PICTURES: dict[str, Callable[[], bytes]] = {
    "transparent": transparent,
    "gray and transparent": lambda: saved(Image.new("LA", WHOLE_SIZE), "PNG"),
    "a palette": lambda: saved(Image.new("P", WHOLE_SIZE), "PNG"),
    "16 bits": lambda: saved(Image.new("I;16", WHOLE_SIZE), "PNG"),
    "a JPEG": lambda: saved(Image.new("RGB", WHOLE_SIZE), "JPEG"),
    "a turned JPEG": lambda: saved(Image.new("RGB", WHOLE_SIZE), "JPEG", exif=turned()),
    "a CMYK JPEG": lambda: saved(Image.new("CMYK", WHOLE_SIZE), "JPEG"),
    "a turned transparent PNG": lambda: saved(Image.new("RGBA", WHOLE_SIZE), "PNG", exif=turned()),
    "a progressive JPEG": lambda: saved(Image.new("RGB", WHOLE_SIZE), "JPEG", progressive=True),
    "a GIF": lambda: saved(Image.new("P", WHOLE_SIZE), "GIF"),
    "12 MiB": lambda: transparent(MAX_FILE - (512 << 10)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_largest_pictures(server: ServerProcess, name: str) -> None:
    body = server.picture(PICTURES[name]())
    assert server.ask(body) == (200, None)


REFUSED: dict[str, Callable[[], bytes]] = {
    "a WebP": lambda: saved(Image.new("RGB", WHOLE_SIZE), "WEBP"),
    "a TIFF of one strip": lambda: saved(
        Image.new("RGB", WHOLE_SIZE), "TIFF", compression="tiff_deflate", tiffinfo={278: 3072}
    ),
    "a progressive JPEG of all colors": lambda: saved(
        Image.new("RGB", WHOLE_SIZE), "JPEG", progressive=True, subsampling=0
    ),
    "one row": lambda: png(12_000_000, 1, 0, zlib.compress(bytes(12_000_001))),
    "one column": lambda: png(1, 12_000_000, 0, zlib.compress(bytes(24_000_000))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_take_more_memory(server: ServerProcess, name: str) -> None:
    assert server.ask(server.picture(REFUSED[name]())) == (400, "invalid_image")


def test_large_pictures_at_once(server: ServerProcess) -> None:
    """Each is another picture, so none is found in the cache. One is decoded, and another one answered."""
    server.allowed = 80 << 20
    bodies = [server.picture(transparent() + bytes([number])) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = set(pool.map(server.ask, bodies))
    assert (200, None) in answers
    assert answers <= {(200, None), (429, "queue_full")}


def test_nine_clients_with_urls_of_16_mib(server: ServerProcess) -> None:
    small = saved(Image.new("RGB", (64, 64)), "PNG")
    bodies = [server.picture((small + bytes([number])).ljust(MAX_FILE, b"\0")) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(server.ask, bodies))
    assert (200, None) in answers
    assert set(answers) <= {(200, None), (429, "too_many_bytes"), CLOSED}


def test_the_largest_files_of_the_largest_pictures_at_once(server: ServerProcess) -> None:
    """One is decoded, and the bodies of others wait: docs/security.md."""
    server.allowed = 112 << 20
    bodies = [server.picture(transparent(MAX_FILE - (512 << 10)) + bytes([number])) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.ask, bodies))
    assert (200, None) in answers
    assert set(answers) <= {(200, None), (429, "too_many_bytes"), CLOSED}
