"""A client of the server on Ray Serve."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import numpy as np
from PIL import Image

QUESTION, TOKENS = "What is it?", 24


@dataclass
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        text: str = self.body["choices"][0]["message"]["content"]
        return text

    @property
    def replica(self) -> str:
        return self.headers["x-fusion-replica"]


@dataclass(frozen=True)
class Server:
    """An application on the loopback."""

    port: int
    prefix: str = ""
    """Start of its paths."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of each request."""

    def open(
        self, method: str, path: str, content: str | None = None, **headers: str
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """Send a request; return the connection, to be closed, and the head of the response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        kind = {"Content-Type": "application/json"}
        connection.request(method, self.prefix + path, content, {**kind, **self.headers, **headers})
        return connection, connection.getresponse()

    def ask(self, body: dict[str, Any], **headers: str) -> Answer:
        """Ask for a chat completion."""
        connection, response = self.open("POST", "/v1/chat/completions", json.dumps(body), **headers)
        try:
            return Answer(response.status, dict(response.getheaders()), json.loads(response.read()))
        finally:
            connection.close()

    def metrics(self) -> tuple[str, dict[str, float]]:
        """Return the name of one of the replicas, and its metrics by name and labels."""
        connection, response = self.open("GET", "/metrics")
        try:
            lines = response.read().decode().splitlines()
            values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            return response.headers["x-fusion-replica"], {name: float(value) for name, value in values.items()}
        finally:
            connection.close()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def chat(seed: int, **options: Any) -> dict[str, Any]:
    """Return a request about the picture of a seed."""
    file = io.BytesIO()
    picture(seed).save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"model": "tiny", "max_tokens": TOKENS, "messages": [{"role": "user", "content": parts}]} | options
