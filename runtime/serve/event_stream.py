"""Server-sent events."""

from __future__ import annotations

from starlette.types import Send


class EventStream:
    """A response of server-sent events. The first event sends the status 200."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._headers = headers
        self.has_begun = False
        """Whether the status is sent."""

    async def send(self, data: bytes) -> None:
        """Send one event."""
        if not self.has_begun:
            self.has_begun = True
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **self._headers}
            encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": encoded})
        await self._send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": True})

    async def end(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
