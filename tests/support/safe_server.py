"""A server process behind the middleware of ``fusion-serve``, with a small application in place of the model.

``python tests/support/safe_server.py SETTINGS`` takes a pickle in base64 and prints its port.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fusion_edge.runtime.serve import logs
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.images import ImageSource
from fusion_edge.runtime.serve.middleware import middleware
from fusion_edge.runtime.serve.picture_url import PictureUrl
from fusion_edge.runtime.serve.protocol import uvicorn_options
from fusion_edge.runtime.serve.safety import SafetySettings
from fusion_edge.runtime.system.malloc import return_large_blocks


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    def memory(self, row: str = "VmHWM") -> int:
        """Return a row of the process's status in bytes: the peak of its memory, or ``VmRSS``."""
        found = re.search(rf"{row}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) << 10

    def connect(self, seconds: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), seconds)

    def exchange(self, data: bytes, seconds: float = 20) -> bytes:
        """Send bytes and return everything until the server closes."""
        with self.connect(seconds) as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Return everything until the peer closes."""
    parts: list[bytes] = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:  # after a refusal, with bytes of ours unread
        pass
    return b"".join(parts)


def head(path: str, *headers: str, method: str = "GET") -> bytes:
    """Return the head of a request that ends its connection."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def status(answer: bytes) -> int:
    """Return the status of a response."""
    return int(answer.split(b" ", 2)[1])


def code(answer: bytes) -> str | None:
    """Return the ``code`` of an error in OpenAI's form."""
    found: str | None = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
    return found


@contextmanager
def running(settings: SafetySettings, stderr: Path | None = None) -> Iterator[Server]:
    """Run a server until the block ends."""
    argument = base64.b64encode(pickle.dumps(settings)).decode()
    log = open(stderr, "wb") if stderr else None  # noqa: SIM115 (closed below)
    process = subprocess.Popen([sys.executable, __file__, argument], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        yield Server(process, int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
        if log is not None:
            log.close()


def application(settings: SafetySettings) -> Starlette:
    """Return an application that measures bodies, decodes pictures, fails, and sends without end."""
    source = ImageSource(settings.images)

    async def size(request: Request) -> Response:
        return JSONResponse({"bytes": len(await request.body())})

    async def image(request: Request) -> Response:
        loaded = await source.load(PictureUrl(json.loads(await request.body())["url"]), "url")
        return JSONResponse({"shape": loaded.crops.shape})

    async def fail(request: Request) -> Response:
        raise ValueError(f"{request.url} {request.headers} {await request.body()!r}")

    async def pour(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            while True:
                await asyncio.sleep(0)  # for the task that waits for the client to leave
                yield bytes(1 << 16)

        return StreamingResponse(parts())

    def answer(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status)

    routes = [
        Route("/health", size),
        Route("/ready", size),
        *(Route(f"/v1/{route.__name__}", route, methods=["GET", "POST"]) for route in (size, image, fail, pour)),
    ]
    return Starlette(
        routes=routes, middleware=middleware(settings), exception_handlers={ApiError: answer, HTTPException: _missing}
    )


def _missing(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({}, error.status_code)


def main() -> None:
    """Serve until terminated."""
    settings = pickle.loads(base64.b64decode(sys.argv[1]))
    logs.configure()
    return_large_blocks()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(application(settings), **uvicorn_options(settings.requests))
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
