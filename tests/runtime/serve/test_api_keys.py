"""API keys, and what needs one."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.serve.api_keys import ApiKeys, RequireKey, check_exposure, read_keys

FIRST, SECOND = "0123456789abcdef", "another-key-of-the-file"


def write(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def error(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_keys(path)
    return str(caught.value)


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    text = f"# keys of the fleet\n\n{FIRST} robot one\r\n\t{SECOND}  # robot two\n"
    return read_keys(write(tmp_path / "keys", text))


def test_a_file_with_comments_and_names(keys: ApiKeys) -> None:
    assert len(keys.digests) == 2
    assert keys.allows(FIRST.encode())
    assert keys.allows(SECOND.encode())
    for wrong in ("", FIRST[:-1], FIRST + "x", FIRST.upper(), "robot", "#", f"{FIRST} robot one"):
        assert not keys.allows(wrong.encode())


def test_keys_are_pickled_and_printed_as_digests(keys: ApiKeys) -> None:
    assert pickle.loads(pickle.dumps(keys)).allows(FIRST.encode())
    assert FIRST.encode() not in pickle.dumps(keys)
    assert repr(keys) == "ApiKeys()"


def test_all_keys_are_compared_in_constant_time(keys: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert keys.allows(FIRST.encode())
    assert not keys.allows(b"x")
    assert compared == [(32, 32)] * 4


def test_wrong_files(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in error(tmp_path / "missing")
    assert "expected a regular file" in error(tmp_path)
    assert "has no key; make one with `openssl rand -hex 32`" in error(write(tmp_path / "a", "# nothing\n"))
    for line in ("short", "x" * 15, "schlüssel-schlüssel", "\0" * 20):
        message = error(write(tmp_path / "a", f"# keys\n{line}\n"))
        assert "Line 2 of the key file" in message
        assert line not in message
    assert "same key in lines 1 and 3" in error(write(tmp_path / "a", f"{FIRST}\n{SECOND}\n{FIRST} again\n"))
    assert "more than 1048576 bytes" in error(write(tmp_path / "a", b"#" * (1 << 20) + b"\n"))
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "expected a regular file" in error(tmp_path / "pipe")


def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    for mode in range(0o400, 0o1000):
        path = write(tmp_path / f"keys{mode}", FIRST, mode)
        if mode & 0o026:
            assert "is open to other users; run chmod 600" in error(path)
        else:
            assert read_keys(path).allows(FIRST.encode())


# --- Hosts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "0:0:0:0:0:0:0:1"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "192.168.1.5", "8.8.8.8", "fe80::1", "fe80::1%lo", "128.0.0.1", "::2"]
)
def test_other_addresses_need_one(host: str, keys: ApiKeys) -> None:
    with pytest.raises(UsageError, match=r"reachable from other machines; add --api-key-file FILE"):
        check_exposure(host, None)
    check_exposure(host, keys)


@pytest.mark.parametrize(
    ("addresses", "allowed"),
    [
        (["127.0.0.1"], True),
        (["::1", "127.0.0.1"], True),
        (["127.0.0.1", "10.0.0.1"], False),
        (["10.0.0.1"], False),
        (["fe80::1%2"], False),
        ([], False),
    ],
)
def test_names_count_by_all_their_addresses(
    addresses: list[str], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``localhost``, too, which a hosts file may redefine."""

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> list[Any]:
        assert host == "localhost"
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    if allowed:
        check_exposure("localhost", None)
    else:
        with pytest.raises(UsageError, match="--host localhost is reachable"):
            check_exposure("localhost", None)


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> list[Any]:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(UsageError, match="no address and no name"):
        check_exposure("robot.invalid", None)


# --- Requests -------------------------------------------------------------------------------------


def ask(
    keys: ApiKeys, path: str, *headers: tuple[bytes, bytes], kind: str = "http", method: str = "GET"
) -> list[dict[str, Any]]:
    """Return what is sent; ``[]`` if the application runs."""
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        sent.clear()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
    asyncio.run(RequireKey(application, keys)(scope, receive, send))
    return sent


def bearer(key: str, scheme: str = "Bearer") -> tuple[bytes, bytes]:
    return b"authorization", f"{scheme} {key}".encode()


def test_the_error_has_openais_form(keys: ApiKeys) -> None:
    start, body, _ = ask(keys, "/v1/models")
    assert start["status"] == 401
    assert dict(start["headers"])[b"www-authenticate"] == b"Bearer"
    assert json.loads(body["body"]) == {
        "error": {
            "message": "The API key is missing or wrong; send it in the header Authorization: Bearer KEY.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }


def test_keys_open_everything(keys: ApiKeys) -> None:
    for header in (bearer(FIRST), bearer(SECOND), bearer(FIRST, "bearer"), bearer(f"  {FIRST} ")):
        assert ask(keys, "/v1/chat/completions", header) == []
        assert ask(keys, "/metrics", header) == []


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(keys: ApiKeys, path: str) -> None:
    assert ask(keys, path) == ask(keys, path, method="HEAD") == []
    assert ask(keys, path, method="POST")[0]["status"] == 401  # whose body would count


@pytest.mark.parametrize(
    "path",
    ["/", "/metrics", "/openapi.json", "/health/", "/health/x", "//health", "/HEALTH", "/health/../v1/models", ""],
)
def test_everything_else_does(keys: ApiKeys, path: str) -> None:
    assert ask(keys, path)[0]["status"] == 401


@pytest.mark.parametrize(
    "headers",
    [
        [bearer("")],
        [bearer(FIRST[:-1])],
        [bearer(FIRST, "Basic")],
        [bearer(FIRST, "")],
        [(b"authorization", FIRST.encode())],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer\t" + FIRST.encode())],
        [(b"x-api-key", FIRST.encode())],
        [bearer(FIRST), bearer(FIRST)],
        [bearer("wrong"), bearer(FIRST)],
    ],
)
def test_other_headers_do_not_open(keys: ApiKeys, headers: list[tuple[bytes, bytes]]) -> None:
    assert ask(keys, "/v1/models", *headers)[0]["status"] == 401


@given(st.binary(max_size=60))
def test_any_header_is_refused(value: bytes) -> None:
    keys = ApiKeys((bytes(32),))
    assert ask(keys, "/v1/models", (b"authorization", value))[0]["status"] == 401


def test_only_http_passes(keys: ApiKeys) -> None:
    assert ask(keys, "", kind="lifespan") == []
    assert ask(keys, "/health", kind="websocket") == [{"type": "websocket.close", "code": 1008}]
