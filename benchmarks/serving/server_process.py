"""A fusion-serve process to measure, and a client of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

SERVE = "from fusion_edge.runtime.cli.entry import serve; raise SystemExit(serve())"
MODEL = "measured"
PROBE_SECONDS = 0.05


@dataclass
class Response:
    """A response that has been read."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    """From the request to the end of the response."""


class Client:
    """A connection that is kept open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def request(self, method: str, path: str, body: bytes | None = None) -> Response:
        """Send a request and read the response."""
        start = time.perf_counter()
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        content = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Response(response.status, headers, content, time.perf_counter() - start)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = self.request("GET", "/metrics").body.decode().splitlines()
        values = [line.rpartition(" ")[2] for line in lines if re.match(rf"fusion_{name}(\{{| )", line)]
        return sum(map(float, values))


@dataclass
class ServerProcess:
    """A server of a bundle."""

    process: subprocess.Popen[str]
    port: int

    def client(self) -> Client:
        """Return a new connection."""
        return Client(self.port)

    def memory(self, row: str = "RssAnon") -> int:
        """Return bytes of a row of the process's status."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{row}:")[2].split()[0]) << 10


def send(port: int, request: bytes) -> socket.socket:
    """Send a question on a connection of its own, and return that."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(request)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + request)
    return connection


@contextmanager
def server_process(bundle: Path, options: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Serve a bundle in a process of its own."""
    command = [sys.executable, "-c", SERVE, str(bundle), "--port", "0", "--model-name", MODEL, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"serving .*:(\d+)/v1", line) for line in process.stderr)))
            yield ServerProcess(process, int(found[1]))
        finally:
            process.terminate()


@contextmanager
def probing(server: ServerProcess) -> Iterator[list[float]]:
    """Ask for the health every :data:`PROBE_SECONDS`. The list gets the seconds of every answer."""
    seconds: list[float] = []
    end = threading.Event()

    def probe() -> None:
        client = server.client()
        while not end.wait(PROBE_SECONDS):
            response = client.request("GET", "/health")
            assert response.status == 200
            seconds.append(response.seconds)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield seconds
    finally:
        end.set()
        thread.join()


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least ``percent`` of all values do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Return percentiles of seconds in milliseconds."""
    return {f"p{percent}": round(1000 * percentile(values, percent), 2) for percent in (50, 95, 99)}


def picture(seed: int) -> npt.NDArray[np.uint8]:
    """Return random pixels, 320 x 240."""
    return np.random.default_rng(seed).integers(0, 256, (240, 320, 3), np.uint8)


def body(pixels: npt.NDArray[np.uint8], question: str, **fields: Any) -> bytes:
    """Return the body of a question about a picture, as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}]} | fields).encode()
