"""Keep web pages away from a server on the machine of their reader."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.refusal import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True)
class BrowserRules:
    """Which web pages may ask."""

    origins: tuple[str, ...] = ()
    """Exact origins of pages, such as ``https://chat.example``."""
    local_hosts_only: bool = True
    """Whether ``Host`` must name this machine. A page whose host name changes to 127.0.0.1 (DNS rebinding) is of the
    same origin for the browser, but still sends its own name."""


class RefusePages:
    """ASGI middleware that refuses requests of web pages. CORS alone hides only the response from a page."""

    def __init__(self, app: ASGIApp, rules: BrowserRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or answer 403 or 421."""
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await refuse(error, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        for name, value in scope["headers"]:
            text = value.decode("latin-1")
            if name == b"origin" and text not in self._rules.origins:
                message = "Web pages of this origin are not allowed; start the server with --allow-origin."
                return ApiError(403, message, code="origin_not_allowed")
            if name == b"host" and self._rules.local_hosts_only and not _is_local(text):
                message = "The header Host does not name this machine; use localhost, or start with --api-key-file."
                return ApiError(421, message, code="host_not_allowed")
        return None


def _is_local(host: str) -> bool:
    """Return whether ``HOST[:PORT]`` is ``localhost`` or a loopback address."""
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, "0"
    if not (port.isascii() and port.isdigit()):
        return False
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name[1:-1] if name[:1] == "[" and name[-1:] == "]" else name).is_loopback
    except ValueError:
        return False
