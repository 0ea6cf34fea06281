"""Refuse a request before its body is read."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING

from fusion_edge.runtime.serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import Receive, Send

# A connection that is closed with unread bytes is reset, and some clients then lose the response: read a few.
_DRAINED_BYTES = 1 << 20
_DRAINED_SECONDS = 1.0


async def refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Send ``error`` at once, and close the connection without reading more than a little of the body."""
    headers, body = closing_response(error)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})  # complete by its length
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), _DRAINED_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def closing_response(error: ApiError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers, in lower case, and the body of a response that closes the connection."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    return [(name.lower().encode(), value.encode()) for name, value in (headers | error.headers).items()], body


async def _drain(receive: Receive) -> None:
    drained = 0
    while drained < _DRAINED_BYTES:
        message = await receive()
        drained += len(message.get("body", b""))
        if not message.get("more_body", False):  # the last part, or a client that has left
            return
