"""Fetch a picture by HTTPS from an address that is checked first.

asyncio's streams and h11, uvicorn's own parser, instead of an HTTP client: the connection goes to the checked address,
while certificate, SNI and ``Host`` are those of the name. A client that resolves the name again could be answered with
another address (DNS rebinding). There are no proxies, cookies, credentials or decompression to switch off.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

import h11

from fusion_edge.runtime.serve.images.addresses import is_public
from fusion_edge.runtime.serve.images.errors import ImageError, Reason
from fusion_edge.runtime.serve.images.https_url import HttpsUrl, parse_https_url, redirected
from fusion_edge.runtime.serve.images.limits import ImageLimits

MAX_REDIRECTS = 3
PORT = 443

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Resolve = Callable[[str], Awaitable[list[str]]]
"""From a host name to its addresses."""
Connect = Callable[[str, str], Awaitable[Stream]]
"""From an address and the name that its certificate must have to a connection."""

_REDIRECTS = {301, 302, 303, 307, 308}
_CHUNK = 64 << 10


async def resolve(host: str) -> list[str]:
    """Return the addresses of ``host``."""
    found = await asyncio.get_running_loop().getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def connect(address: str, host: str) -> Stream:
    """Connect to ``address`` and check that the certificate is of ``host``."""
    context = await asyncio.to_thread(_tls)
    return await asyncio.open_connection(address, PORT, ssl=context, server_hostname=host)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the context of all connections: to read the authorities takes tens of milliseconds."""
    return ssl.create_default_context()


class HttpsFetcher:
    """Fetches pictures of allowed hosts."""

    def __init__(self, limits: ImageLimits, resolve: Resolve = resolve, connect: Connect = connect) -> None:
        self._limits, self._resolve, self._connect = limits, resolve, connect

    async def fetch(self, url: str) -> bytes:
        """Return the bytes of a picture. Raises :class:`ImageError`."""
        parsed = parse_https_url(url, self._limits.hosts)
        try:
            return await asyncio.wait_for(self._follow(parsed), self._limits.fetch_seconds)
        except asyncio.TimeoutError:
            raise _unreachable(f"is not there within {self._limits.fetch_seconds:g} s") from None
        except ssl.SSLError:
            raise _unreachable("comes from a host without a valid certificate") from None
        except OSError:
            raise _unreachable("cannot be fetched from its host") from None
        except h11.ProtocolError:
            raise _unreachable("comes with an invalid HTTP response") from None

    async def _follow(self, url: HttpsUrl) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            reader, writer = await self._open(url.host)
            try:
                answer = await self._get(url, reader, writer)
            finally:
                writer.transport.abort()  # without waiting for the peer
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise _unreachable(f"is behind more than {MAX_REDIRECTS} redirects")

    async def _open(self, host: str) -> Stream:
        """Connect to an address of ``host``, if all of them are public."""
        addresses = await self._resolve(host)
        if not addresses or not all(map(is_public, addresses)):
            raise ImageError(
                Reason.NOT_ALLOWED,
                "The URL's host has an address that is not public; send the picture as a data: URL.",
            )
        seconds = self._limits.fetch_seconds / len(addresses)
        for address in addresses[:-1]:
            with suppress(OSError, asyncio.TimeoutError):  # a machine without IPv6, or a host that is down in part
                return await asyncio.wait_for(self._connect(address, host), seconds)
        return await self._connect(addresses[-1], host)

    async def _get(self, url: HttpsUrl, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | HttpsUrl:
        """Return the body of a response, or where it redirects to."""
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", url.host), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
        request = h11.Request(method="GET", target=url.target, headers=headers)
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                target = self._checked(url, event)
                if target is not None:
                    return target
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._limits.max_bytes:
                    raise self._too_large()
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)

    def _checked(self, url: HttpsUrl, response: h11.Response) -> HttpsUrl | None:
        """Check the head of a response; return where it redirects to."""
        headers = {name: value.decode("latin-1") for name, value in response.headers}
        if response.status_code in _REDIRECTS:
            if not headers.get(b"location"):
                raise _unreachable("is redirected to nowhere")
            return redirected(url, headers[b"location"], self._limits.hosts)
        if response.status_code != 200:
            raise _unreachable(f"is answered with HTTP status {response.status_code}")
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise _unreachable("is compressed by its host, though that was not asked for")
        if int(headers.get(b"content-length", "0")) > self._limits.max_bytes:  # h11 accepts digits only
            raise self._too_large()
        return None

    def _too_large(self) -> ImageError:
        limit = self._limits.max_bytes
        return ImageError(Reason.TOO_LARGE, f"The picture has more than {limit} bytes, the limit; scale it down.")


def _unreachable(what: str) -> ImageError:
    return ImageError(Reason.UNREACHABLE, f"The picture of the URL {what}; check the URL, or send the picture itself.")
