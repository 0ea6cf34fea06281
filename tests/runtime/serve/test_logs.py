"""Nothing of a request is logged."""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.safe_server import head, running, status

from fusion_edge.runtime.images.encoded import decode
from fusion_edge.runtime.serve import logs
from fusion_edge.runtime.serve.api_keys import ApiKeys
from fusion_edge.runtime.serve.safety import SafetySettings

SECRET = "s3cr3t-0f-a-r3qu3st"


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Returns what is logged after ``logs.configure``."""
    root, warned = logging.getLogger(), logging.getLogger("py.warnings")
    handlers, level, hooks = root.handlers[:], root.level, (threading.excepthook, sys.unraisablehook)
    yield lambda: capsys.readouterr().err
    logging.captureWarnings(False)
    warned.setLevel(logging.NOTSET)
    threading.excepthook, sys.unraisablehook = hooks
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


def damaged_exif() -> bytes:
    """Return a JPEG with a text in EXIF that is shorter than its tag says: Pillow warns of it."""
    exif = Image.Exif()
    exif[0x010E] = SECRET
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", exif=exif)
    length = struct.pack(">HHI", 0x010E, 2, len(SECRET) + 1)
    assert length in file.getvalue()
    return file.getvalue().replace(length, struct.pack(">HHI", 0x010E, 2, 9999))


def test_warnings_are_not_logged(output: Callable[[], str]) -> None:
    with pytest.warns(UserWarning, match="270"):
        decode(damaged_exif(), 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: print(message, file=sys.stderr)
        logs.configure()
        warnings.warn(SECRET, stacklevel=1)
        decode(damaged_exif(), 1000)
        logging.captureWarnings(False)
    assert output() == ""


def test_exceptions_of_threads_are_logged_by_their_places(output: Callable[[], str]) -> None:
    logs.configure()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

    class Fails:
        def __del__(self) -> None:
            fail()

    Fails()
    text = output()
    assert text.startswith("ERROR fusion_edge: A thread failed.\nValueError\n")
    assert "ERROR fusion_edge: An exception was ignored.\nValueError\n" in text
    assert SECRET not in text


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
