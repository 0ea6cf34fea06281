"""Nothing of a request is logged."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.safe_server import head, running, status

from fusion_edge.runtime.serve import logs
from fusion_edge.runtime.serve.api_keys import ApiKeys
from fusion_edge.runtime.serve.safety import SafetySettings

SECRET = "s3cr3t-0f-a-r3qu3st"


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Returns what is logged after ``logs.configure``."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield lambda: capsys.readouterr().err
    root.handlers[:] = handlers
    root.setLevel(level)


def fail() -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise ValueError(f"wrong {SECRET}") from error


def log(name: str) -> None:
    logging.getLogger(name).error("message of %s", name)
    try:
        fail()
    except ValueError:
        logging.getLogger(name).exception("failed")


def test_own_messages_are_logged_and_exceptions_by_their_places(output: Callable[[], str]) -> None:
    logs.configure()
    log("uvicorn.error")
    text = output()
    assert text.startswith("ERROR uvicorn.error: message of uvicorn.error\nERROR uvicorn.error: failed\nValueError\n")
    assert "KeyError" in text
    assert f"{__file__}:" in text
    assert "in fail" in text
    assert SECRET not in text


def test_other_libraries_are_logged_by_their_places(output: Callable[[], str]) -> None:
    logs.configure()
    logging.getLogger("asyncio").error(f"Task failed: {SECRET}")
    logging.getLogger("PIL.Image").warning("%s", SECRET)
    logging.getLogger("other").info("not logged")
    logging.getLogger("uvicorn.error").info("not logged")
    log("uvicorn.access")
    lines = output().splitlines()
    assert lines[0].startswith(f"ERROR asyncio: message at {__file__}:")
    assert lines[1].startswith(f"WARNING PIL.Image: message at {__file__}:")
    assert not any(SECRET in line or "not logged" in line for line in lines)


def test_a_secret_in_every_part_of_a_request_is_logged_nowhere(tmp_path: Path) -> None:
    key = "k" * 20
    settings = SafetySettings(keys=ApiKeys((hashlib.sha256(key.encode()).digest(),)))
    bearer = f"Authorization: Bearer {key}"
    body = f'{{"url": "data:{SECRET}"}}'
    length = f"Content-Length: {len(body)}"
    requests = {
        head("/v1/size", "Connection: close", f"Authorization: Bearer {SECRET}"): 401,
        head(
            f"/v1/{SECRET}?{SECRET}", bearer, f"X-{SECRET}: {SECRET}", f"Cookie: a={SECRET}", "Connection: close"
        ): 404,
        head("/v1/image", bearer, length, "Connection: close", method="POST") + body.encode(): 400,
        head(f"/v1/fail?{SECRET}", bearer, length, f"X: {SECRET}", method="POST") + body.encode(): 500,
        head(f"/v1/size?{SECRET}", bearer, f"Upgrade: {SECRET}", "Connection: upgrade, close"): 200,
        head(f"/v1/size?{SECRET}", bearer, "Upgrade: websocket", "Connection: upgrade, close"): 200,
        head(f"/v1/size?{SECRET}", bearer, method=SECRET.upper()): 405,
        head(f"/v1/size?{SECRET}", f"Origin: https://{SECRET}.example"): 403,
        head("/v1/size", bearer, f"Transfer-Encoding: {SECRET}"): 400,
        f"GET /{SECRET} HTTP/1.1\r\n{SECRET}\r\n\r\n".encode(): 400,
        f"{SECRET}\r\n\r\n".encode(): 400,
        head("/v1/size", bearer, "Transfer-Encoding: chunked", method="POST") + f"{SECRET}\r\n".encode(): 400,
    }
    with running(settings, tmp_path / "log") as server:
        for request, expected in requests.items():
            with server.connect() as connection:
                connection.sendall(request)
                assert status(connection.recv(65536)) == expected, request
        with server.connect() as connection:  # one that leaves in the middle of its body
            connection.sendall(
                head(f"/v1/fail?{SECRET}", bearer, "Content-Length: 1000", method="POST") + SECRET.encode()
            )
        time.sleep(0.2)
    text = (tmp_path / "log").read_text()
    assert "Exception in ASGI application" in text
    assert "ValueError" in text
    assert "in fail" in text
    for part in (SECRET, SECRET.upper(), SECRET.title(), key):
        assert part not in text
