"""HTTP/1.1 connections that slow or numerous clients cannot hold.

uvicorn times out idle connections after a response, but no head of a request and no response that nobody reads. No ASGI
application sees these, so uvicorn's protocol is extended here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.limits import RequestLimits
from fusion_edge.runtime.serve.refusal import closing_response

_HEAD_BYTES = 64 << 10  # of a head that h11 waits for
_EARLY_BYTES = 64 << 10
"""Bytes behind a request that are kept until its response ends. More are dropped, and the connection is closed then."""


def uvicorn_options(limits: RequestLimits) -> dict[str, Any]:
    """Return the arguments of ``uvicorn.Config`` that safety depends on."""
    protocol = type("LimitedProtocol", (BoundedProtocol,), {"limits": limits})
    return {
        "http": protocol,  # not httptools, which "auto" takes if it is installed: it bounds no head
        "h11_max_incomplete_event_size": _HEAD_BYTES,
        "ws": "none",
        "access_log": False,
        "log_config": None,  # logs.configure
        "proxy_headers": False,
        "server_header": False,
    }


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with deadlines for heads and for clients that do not read, and a limit of connections."""

    limits = RequestLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer, self._write_timer = _Timer(self.loop), _Timer(self.loop)
        self._head_bytes = 0
        self._drops = False
        """Whether further bytes are dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a head, or close one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._head_timer.start(self.limits.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._head_timer.stop()
        self._write_timer.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and watch the time of the head that it waits for."""
        if self._drops:
            return
        if self.conn.their_state is h11.MUST_CLOSE:  # a request with Connection: close is complete
            self._drops = True
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_timer.stop()
            self._head_bytes = 0
        else:  # also the first bytes of a further request
            self._head_timer.start(self.limits.head_seconds, self._head_is_late)

    def handle_events(self) -> None:
        """Parse what has been received. Read on behind a complete request, where uvicorn stops.

        Only who reads sees that the client leaves.
        """
        super().handle_events()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if len(self.conn.trailing_data[0]) > _EARLY_BYTES:
            self._drops = True
            self.cycle.keep_alive = False

    def pause_writing(self) -> None:
        """Start to wait for a client that does not read."""
        super().pause_writing()
        self._write_timer.start(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting for the client."""
        self._write_timer.stop()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP."""
        if self._head_bytes > _HEAD_BYTES:
            self._refuse(ApiError(431, f"The request's head has more than {_HEAD_BYTES} bytes; send fewer headers."))
        else:
            self._refuse(ApiError(400, "The request is not valid HTTP/1.1."))

    def _head_is_late(self) -> None:
        message = f"The request's head did not arrive within {self.limits.head_seconds:g} s."
        self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, if no other answer has begun, and close the connection."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = closing_response(error)
            reason = HTTPStatus(error.status).phrase
            response = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Timer:
    """Calls a function later, once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        """Start unless it runs."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
