"""When a request arrived."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_KEY = "fusion_edge.arrived"


class NoteArrival:
    """ASGI middleware, the outermost one, that notes the time before the body of a request is received."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] == "http":
            scope.setdefault("state", {})[_KEY] = time.monotonic()
        await self._app(scope, receive, send)


def arrival(scope: Scope) -> float:
    """Return when a request arrived, in seconds of ``time.monotonic``."""
    arrived: float = scope["state"][_KEY]
    return arrived
