"""Pictures by HTTPS: none of an address that is not public, good ones arrive."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from support.image_hosts import HOST, INNER, LIMITS, OTHER, PUBLIC, Network, refused

from fusion_edge.runtime.serve.images import https
from fusion_edge.runtime.serve.images.errors import ImageError, Reason
from fusion_edge.runtime.serve.images.https import HttpsFetcher, Stream
from fusion_edge.runtime.serve.images.limits import ImageLimits

# --- Addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["192.168.1.1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["::1"],
        ["::"],
        ["::ffff:169.254.169.254"],
        ["64:ff9b::a9fe:a9fe"],
        ["2002:7f00:1::"],
        ["fe80::1"],
        ["fe80::1%2"],
        ["fd00::1"],
        ["ff02::1"],
        [PUBLIC, "10.0.0.1"],
        ["10.0.0.1", PUBLIC],
        [PUBLIC, "::1"],
        [],
    ],
)
def test_one_address_that_is_not_public_is_enough(addresses: list[str]) -> None:
    network = Network({INNER: addresses})
    assert refused(network, f"https://{INNER}/x.png").reason is Reason.NOT_ALLOWED
    assert (network.resolved, network.connected) == ([INNER], [])


def test_the_name_is_resolved_once() -> None:
    """A second answer of the resolver (DNS rebinding) has no effect."""
    network = Network()
    answers = [[PUBLIC], ["127.0.0.1"]]

    async def resolve(host: str) -> list[str]:
        return answers.pop(0)

    with pytest.raises(ImageError):
        asyncio.run(HttpsFetcher(LIMITS, resolve, network.connect).fetch(f"https://{HOST}/x.png"))
    assert (network.connected, answers) == ([(PUBLIC, HOST)], [["127.0.0.1"]])


def test_unknown_hosts_are_unreachable() -> None:
    network = Network({"other.example": [PUBLIC]})
    assert refused(network, f"https://{HOST}/x.png").reason is Reason.UNREACHABLE
    assert network.connected == []


def test_the_real_connector_resolves_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked address is a literal, which asyncio passes to the socket as it is."""
    asked: list[Any] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def sock_connect(sock: Any, address: Any) -> None:
            asked.append(address)
            raise OSError("no network")

        async def getaddrinfo(*arguments: Any, **options: Any) -> None:
            raise AssertionError("a name was resolved")

        monkeypatch.setattr(loop, "sock_connect", sock_connect)
        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        with pytest.raises(OSError, match="no network"):
            await https.connect(PUBLIC, HOST)

    asyncio.run(run())
    assert asked == [(PUBLIC, 443)]


def test_the_resolver_returns_each_address_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[str]:
        async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
            assert (host, port) == (HOST, 443)
            return [(2, 1, 6, "", (PUBLIC, 443)), (2, 1, 6, "", (PUBLIC, 443)), (10, 1, 6, "", ("2606::1", 443, 0, 0))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        return await https.resolve(HOST)

    assert asyncio.run(run()) == [PUBLIC, "2606::1"]


# --- A local server -------------------------------------------------------------------------------

PICTURE = bytes(range(256)) * 4


@pytest.fixture
def authority() -> Path:
    """A certificate of HOST and OTHER that signs itself, valid until 2126, with its key.

    ``openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=test -addext
    subjectAltName=DNS:images.example.com,DNS:cdn.example.net``
    """
    return Path(__file__).parents[2] / "data/local_tls.pem"


class Exchange:
    """One fetch from a local TLS server that answers with given bytes."""

    def __init__(self, authority: Path, *answers: bytes, pause: float = 0.0) -> None:
        self.authority, self.answers, self.pause = authority, list(answers), pause
        self.requests: list[bytes] = []
        self.names: list[str | None] = []
        self.network = Network()

    def fetch(self, url: str, limits: ImageLimits = LIMITS, trusted: bool = True) -> bytes:
        return asyncio.run(self._fetch(url, limits, trusted))

    def refused(self, url: str, limits: ImageLimits = LIMITS, trusted: bool = True) -> ImageError:
        with pytest.raises(ImageError) as caught:
            self.fetch(url, limits, trusted)
        return caught.value

    async def _fetch(self, url: str, limits: ImageLimits, trusted: bool) -> bytes:
        inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inside.load_cert_chain(self.authority)
        inside.sni_callback = lambda connection, name, context: self.names.append(name)
        client = ssl.create_default_context(cafile=str(self.authority) if trusted else None)
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=inside) as server:
            port = server.sockets[0].getsockname()[1]

            async def connect(address: str, host: str) -> Stream:
                return await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=host)

            self.network.open = connect
            return await self.network.fetcher(limits).fetch(url)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            answer = self.answers.pop(0)
            step = 100 if self.pause else len(answer) or 1
            for begin in range(0, len(answer), step):
                writer.write(answer[begin : begin + step])
                await writer.drain()
                await asyncio.sleep(self.pause)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def response(body: bytes = PICTURE, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if length else []), "", ""]
    return "\r\n".join(lines).encode() + body


def moved(location: str, status: str = "302 Found") -> bytes:
    return response(b"", f"Location: {location}", status=status)


def test_a_picture_arrives(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # has no effect
    exchange = Exchange(authority, response(PICTURE, "Content-Type: text/html", "Set-Cookie: a=b"))
    assert exchange.fetch(f"https://{HOST.upper()}:443/a/b.png?c=d#e") == PICTURE
    assert exchange.network.connected == [(PUBLIC, HOST)]
    assert exchange.names == [HOST]
    assert exchange.requests == [
        f"GET /a/b.png?c=d HTTP/1.1\r\nHost: {HOST}\r\nAccept: image/*\r\nAccept-Encoding: identity\r\n"
        "Connection: close\r\n\r\n".encode()
    ]


def test_a_picture_arrives_in_chunks_and_without_length(authority: Path) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n" + PICTURE + b"\r\n0\r\n\r\n"
    assert Exchange(authority, chunked).fetch(f"https://{HOST}/") == PICTURE
    assert Exchange(authority, response(length=False)).fetch(f"https://{HOST}") == PICTURE


@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
def test_redirects_to_allowed_hosts_are_followed(authority: Path, status: str) -> None:
    exchange = Exchange(authority, moved(f"https://{OTHER}/b.png", status), moved("../c.png", status), response())
    assert exchange.fetch(f"https://{HOST}/a.png") == PICTURE
    assert exchange.network.resolved == [HOST, OTHER, OTHER]
    assert [request.split(b" ")[1] for request in exchange.requests] == [b"/a.png", b"/b.png", b"/c.png"]
    assert not any(b"ookie" in request for request in exchange.requests)


@pytest.mark.parametrize(
    "location",
    [
        *("https://evil.example/", "//evil.example/", f"http://{HOST}/", "file:///etc/passwd", f"https://{HOST}:22/"),
        *("https://127.0.0.1/", "https://[::1]/", f"https://u@{HOST}/", "", "https://[", "data:image/png;base64,AAAA"),
    ],
)
def test_other_redirects_are_refused(authority: Path, location: str) -> None:
    exchange = Exchange(authority, moved(location), response())
    reason = Reason.UNREACHABLE if location == "" else Reason.NOT_ALLOWED
    assert exchange.refused(f"https://{HOST}/a.png").reason in (reason, Reason.INVALID_URL)
    assert (len(exchange.requests), exchange.network.resolved) == (1, [HOST])


def test_a_redirect_to_an_allowed_host_of_a_private_address_is_refused(authority: Path) -> None:
    exchange = Exchange(authority, moved(f"https://{INNER}/"), response())
    exchange.network.addresses[INNER] = ["169.254.169.254"]
    assert exchange.refused(f"https://{HOST}/a.png").reason is Reason.NOT_ALLOWED
    assert len(exchange.network.connected) == 1


def test_redirects_end(authority: Path) -> None:
    exchange = Exchange(authority, *[moved("/again")] * 10)
    assert exchange.refused(f"https://{HOST}/").reason is Reason.UNREACHABLE
    assert len(exchange.requests) == https.MAX_REDIRECTS + 1


def test_certificates_are_checked(authority: Path) -> None:
    exchange = Exchange(authority, response())
    assert "certificate" in exchange.refused(f"https://{HOST}/", trusted=False).message
    assert exchange.requests == []


def test_the_certificate_must_have_the_name(authority: Path) -> None:
    exchange = Exchange(authority, response())
    exchange.network.addresses[INNER] = [PUBLIC]
    assert "certificate" in exchange.refused(f"https://{INNER}/").message
    assert exchange.requests == []


@pytest.mark.parametrize("length", [True, False])
def test_a_large_picture_is_refused(authority: Path, length: bool) -> None:
    exchange = Exchange(authority, response(bytes(LIMITS.max_bytes + 1), length=length))
    assert exchange.refused(f"https://{HOST}/").reason is Reason.TOO_LARGE
    assert (
        len(Exchange(authority, response(bytes(LIMITS.max_bytes), length=length)).fetch(f"https://{HOST}/")) == 10_000
    )


def test_an_endless_picture_is_refused(authority: Path) -> None:
    chunk = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + PICTURE + b"\r\n") * 1000
    assert Exchange(authority, chunk).refused(f"https://{HOST}/").reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "answer",
    [
        response(PICTURE, status="404 Not Found"),
        response(PICTURE, status="206 Partial Content"),
        response(b"", status="304 Not Modified"),
        response(PICTURE, "Content-Encoding: gzip"),
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000,
    ],
)
def test_other_answers_are_refused(authority: Path, answer: bytes) -> None:
    assert Exchange(authority, answer).refused(f"https://{HOST}/").reason is Reason.UNREACHABLE


@pytest.mark.parametrize("answer", [response(), response(PICTURE, *(["x: y"] * 200))])
def test_a_slow_host_times_out(authority: Path, answer: bytes) -> None:
    limits = ImageLimits(hosts=(HOST,), fetch_seconds=0.3)
    error = Exchange(authority, answer, pause=0.1).refused(f"https://{HOST}/", limits)
    assert "within 0.3 s" in error.message


def test_the_next_address_is_tried(authority: Path) -> None:
    exchange = Exchange(authority, response())
    exchange.network.addresses[HOST] = ["2606:4700::1", PUBLIC]

    async def fetch() -> bytes:
        inner = exchange.network.connect

        async def connect(address: str, host: str) -> Stream:
            if address == "2606:4700::1":
                raise OSError("no IPv6 here")
            return await inner(address, host)

        exchange.network.connect = connect  # type: ignore[method-assign]
        return await exchange._fetch(f"https://{HOST}/", LIMITS, True)

    assert asyncio.run(fetch()) == PICTURE
