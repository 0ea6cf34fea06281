"""fusion-serve in a thread, on a model that tests can block, and clients of its own on 127.0.0.1."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes.watched_backend import picture
from PIL import Image
from starlette.applications import Starlette

from fusion_edge.runtime import Fusion
from fusion_edge.runtime.serve import engine as engines
from fusion_edge.runtime.serve.app import make_app
from fusion_edge.runtime.serve.engine import Engine
from fusion_edge.runtime.serve.limits import RequestLimits
from fusion_edge.runtime.serve.server import Server, listen
from fusion_edge.runtime.serve.settings import ServeSettings

MODEL = "tiny"


def data_url(seed: int = 0) -> str:
    """Return a PNG file of :func:`picture` as a URL."""
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user(question: str = "What?", seed: int | None = 0, **image: Any) -> dict[str, Any]:
    """Return a message of the user, with a picture unless ``seed`` is None."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if seed is not None:
        parts.append({"type": "image_url", "image_url": {"url": data_url(seed)} | image})
    return {"role": "user", "content": parts}


def chat(question: str = "What?", seed: int = 0, **fields: Any) -> dict[str, Any]:
    """Return the body of a request."""
    return {"model": MODEL, "messages": [user(question, seed)], "max_tokens": 6} | fields


@dataclass
class Reply:
    """A response that has been read."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has OpenAI's form."""
        assert self.headers["content-type"] == "application/json"
        body = self.json
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert "\n" not in body["error"]["message"]
        error: dict[str, Any] = body["error"]
        return error

    @property
    def text(self) -> str:
        """The answer of a whole response."""
        assert self.status == 200, self.body
        text: str = self.json["choices"][0]["message"]["content"]
        return text


@dataclass
class HttpServer:
    """A running server."""

    port: int
    app: Starlette
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self) -> Engine:
        engine: Engine = self.app.state.engine
        return engine

    @property
    def fusion(self) -> Fusion:
        return self.engine.loaded.result()

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.request("GET", path)

    def ask(self, body: dict[str, Any] | bytes, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"} | named)

    def send(self, body: dict[str, Any]) -> socket.socket:
        """Send a request, and return its connection."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), 20)
        lines = ("POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(data)}", "", ""))
        connection.sendall(head.encode() + data)
        return connection

    def metric(self, name: str) -> float:
        """Return the value of a metric, such as ``requests_total{reason="x"}``, without the prefix."""
        lines = self.get("/metrics").body.decode().splitlines()
        (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(f"fusion_{name} ")]
        return float(value)


def eventually(is_true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds."""
    due = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < due
        time.sleep(0.002)


@contextmanager
def http_server(load: Callable[[], Fusion], patch: pytest.MonkeyPatch, **settings: Any) -> Iterator[HttpServer]:
    """Serve the model that ``load`` returns, in a thread. ``load`` may block or fail."""
    patch.setattr(engines, "load", lambda *_, **__: load())
    app = make_app(ServeSettings(Path("unused"), MODEL, **settings))
    listener = listen("127.0.0.1", 0)
    server = Server(app, RequestLimits(), drain_seconds=0.01, when_ready=lambda: None)
    started: Future[asyncio.AbstractEventLoop] = Future()

    async def run() -> None:
        started.set_result(asyncio.get_running_loop())
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="server")
    port = listener.getsockname()[1]
    thread.start()
    try:
        eventually(lambda: server.started)
        yield HttpServer(port, app, server, started.result())
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
