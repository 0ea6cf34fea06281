"""Call an ASGI application without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any


def call(
    app: Any, method: str, path: str, headers: dict[str, str], *parts: bytes, raw: Sequence[tuple[bytes, bytes]] = ()
) -> tuple[int, dict[str, str], bytes]:
    """Return the status, headers and body of a response to a request whose body comes in ``parts``."""
    sent: list[dict[str, Any]] = []
    waiting = list(parts) or [b""]

    async def receive() -> dict[str, Any]:
        if not waiting:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    route, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": route,
        "raw_path": route.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()] + list(raw),
    }
    asyncio.run(app(scope, receive, send))
    start = sent[0]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, body
