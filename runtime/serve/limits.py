"""Limits of requests, enforced before the application sees one."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.refusal import refuse
from fusion_edge.runtime.system.malloc import TRIMMED_BYTES, return_free_memory

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HELD_BODY = "fusion_edge.held_body"
"""Key of a request's scope: its :class:`HeldBody`."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits of requests and connections."""

    body_bytes: int = 17 << 20
    """Bytes of a body: a picture of 12 MiB in base64, and text."""
    receiving_bytes: int = 34 << 20
    """Bytes of all bodies in memory: that are being received, or that :class:`HeldBody` counts."""
    body_seconds: float = 30.0
    """Seconds from a request's head to the end of its body."""
    url_bytes: int = 2048
    """Bytes of path and query."""
    headers: int = 100
    """Header lines."""
    header_bytes: int = 16 << 10
    """Bytes of all names and values of headers."""
    head_seconds: float = 10.0
    """Seconds for the head of a request, from its first byte or from the start of the connection."""
    write_seconds: float = 30.0
    """Seconds that a client may leave the response unread."""
    connections: int = 512
    """Connections at once. More are closed."""


class LimitRequests:
    """ASGI middleware that receives the whole body of a request within :class:`RequestLimits`, or refuses it."""

    def __init__(self, app: ASGIApp, limits: RequestLimits, when_crowded: Callable[[], object] = lambda: None) -> None:
        """``when_crowded`` is called for every request that ``receiving_bytes`` refuses."""
        self._app, self._limits, self._when_crowded = app, limits, when_crowded
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with the whole body at hand."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_head(scope)
            # Only a POST has a body that is read: probes, which need no key, share held bytes with it.
            is_read = scope["method"] == "POST"
            body = await asyncio.wait_for(self._body(receive), self._limits.body_seconds) if is_read else b""
        except asyncio.TimeoutError:
            message = f"The body did not arrive within {self._limits.body_seconds:g} s; send a smaller picture."
            await refuse(ApiError(408, message, code="request_timeout"), receive, send)
            return
        except ApiError as error:
            await refuse(error, receive, send)
            return
        if body is None:
            return
        scope[HELD_BODY] = held = HeldBody(body, receive, self._hold)
        del body  # what holds it drops it
        try:
            await self._app(scope, held, send)
        finally:
            if not held.is_owned:
                held.release()
            if held.is_large:
                await asyncio.to_thread(return_free_memory)

    def _hold(self, size: int) -> None:
        """Count the bytes of a body that is complete; negative once it is dropped."""
        self._held += size

    def _check_head(self, scope: Scope) -> None:
        limits, headers = self._limits, scope["headers"]
        if len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"]) > limits.url_bytes:
            raise ApiError(414, f"The URL has more than {limits.url_bytes} bytes; shorten it.", code="url_too_long")
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > limits.headers or size > limits.header_bytes:
            message = f"The request has more than {limits.headers} headers or {limits.header_bytes} bytes of them."
            raise ApiError(431, f"{message[:-1]}; send fewer.", code="headers_too_large")
        for name, value in headers:
            if name == b"content-length" and not (value.isdigit() and len(value) < 20):
                raise ApiError(400, "Content-Length is not a number of bytes; send the length of the body.")
            if name == b"content-length" and int(value) > limits.body_bytes:
                raise self._too_large()

    async def _body(self, receive: Receive) -> bytes | None:
        """Receive the body; return ``None`` if the client leaves before its end."""
        # Not the parts themselves: millions of single bytes need 60 times their size. To grow a large block copies
        # nothing (:func:`.malloc.return_large_blocks`, mremap(2)), and the whole body is this block.
        whole, size = io.BytesIO(), 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                self._held += len(part)
                size += len(part)
                whole.write(part)
                if size > self._limits.body_bytes:
                    raise self._too_large()
                if self._held > self._limits.receiving_bytes:
                    self._when_crowded()
                    retry = (
                        "Too many bytes of requests arrive, or wait until their picture is decoded; try again later."
                    )
                    raise ApiError(429, retry, code="too_many_bytes", headers={"Retry-After": "1"})
                if not message.get("more_body", False):
                    return whole.getvalue()
        finally:
            self._held -= size
            whole.close()  # an error's traceback would keep them

    def _too_large(self) -> ApiError:
        message = f"The body has more than {self._limits.body_bytes} bytes, the limit; scale the picture down."
        return ApiError(413, message, code="request_too_large")


class HeldBody:
    """ASGI's ``receive`` for a body that is complete: the body, which is not kept, then what the client does.

    The body counts for :attr:`RequestLimits.receiving_bytes` until :meth:`release`, at the latest until the end of the
    request, unless something owns it.
    """

    def __init__(self, body: bytes, receive: Receive, hold: Callable[[int], None]) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._hold, self._size = hold, len(body)
        self.is_owned = False
        """Whether :meth:`own` was called."""
        self.is_large = len(body) > TRIMMED_BYTES
        hold(self._size)

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    def own(self) -> None:
        """Count the body until :meth:`release`, also beyond the end of the request: a thread may have it for longer."""
        self.is_owned = True

    def release(self) -> None:
        """Drop the body, also if nothing has received it, and stop counting it. Doing so again does nothing."""
        self._body = None
        self._hold(-self._size)
        self._size = 0
