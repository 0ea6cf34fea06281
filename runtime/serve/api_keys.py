"""API keys, and the rule that a server without them is reachable from its own machine only."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.refusal import refuse
from fusion_edge.runtime.system.regular_file import open_regular

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health", "/ready")
"""Paths whose GET needs no key: what probes of a supervisor ask."""
SHORTEST_KEY = 16
"""Characters of a key."""

_MAX_BYTES = 1 << 20
_MAKE_ONE = "make one with `openssl rand -hex 32`"


@dataclass(frozen=True)
class ApiKeys:
    """Keys, of which any opens the server. Keeps their SHA-256 only."""

    digests: tuple[bytes, ...] = field(repr=False)

    def allows(self, key: bytes) -> bool:
        """Return whether ``key`` is one of the keys, in a time that does not depend on which or how much of it."""
        digest, allowed = hashlib.sha256(key).digest(), False
        for known in self.digests:
            allowed |= hmac.compare_digest(known, digest)
        return allowed


def read_keys(path: Path) -> ApiKeys:
    """Read a file with one key a line; what follows a key on its line names it. Lines that begin with # are comments.

    Raises :class:`UsageError` for a file that others may read or write, that has no key, or an invalid one.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise UsageError(f"The key file {path} cannot be read ({error.strerror}); check its path.") from None
    except FusionError as error:
        raise UsageError(str(error)) from None
    with open(descriptor, "rb") as file:
        mode, data = os.fstat(descriptor).st_mode, file.read(_MAX_BYTES + 1)
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise UsageError(f"The key file {path} is open to other users; run chmod 600 {path}.")
    if len(data) > _MAX_BYTES:
        raise UsageError(f"The key file {path} has more than {_MAX_BYTES} bytes; expected one key a line.")
    keys: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith(b"#"):
            continue
        key = fields[0]
        if len(key) < SHORTEST_KEY or not all(0x21 <= byte <= 0x7E for byte in key):
            raise UsageError(
                f"Line {number} of the key file {path} is no key; expected {SHORTEST_KEY} or more printable "
                f"characters of ASCII: {_MAKE_ONE}."
            )
        if key in keys:
            raise UsageError(f"The key file {path} has the same key in lines {keys[key]} and {number}; delete one.")
        keys[key] = number
    if not keys:
        raise UsageError(f"The key file {path} has no key; {_MAKE_ONE}.")
    return ApiKeys(tuple(hashlib.sha256(key).digest() for key in keys))


def check_exposure(host: str, keys: ApiKeys | None) -> None:
    """Refuse to listen on ``host``, a name or address, without keys, unless it means this machine only.

    Raises :class:`UsageError`.
    """
    if keys is None and not _is_loopback(host):
        raise UsageError(
            f"--host {host} is reachable from other machines; add --api-key-file FILE, or listen on 127.0.0.1."
        )


def _is_loopback(host: str) -> bool:
    try:
        addresses = [host] if _is_address(host) else _resolve(host)
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host} is no address and no name of this machine; use 127.0.0.1.") from None
    return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolve(host: str) -> list[str]:
    if not host:  # every address
        return []
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


class RequireKey:
    """ASGI middleware that lets requests with a key through, and everybody's probes of :data:`OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or answer 401."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._is_allowed(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error = ApiError(
                401,
                "The API key is missing or wrong; send it in the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refuse(error, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD"):
            return True
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and self._keys.allows(key.strip(b" "))
