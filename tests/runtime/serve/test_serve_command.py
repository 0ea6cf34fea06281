"""The command: messages, exit codes, signals. OpenAI's client asks the real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI
from support.http_servers import chat
from support.serve_process import SERVE, serve_process

from fusion_edge.runtime import load
from fusion_edge.runtime.cli import entry, serve
from fusion_edge.runtime.serve.server import listen

Refused = Callable[..., str]


def test_a_process_answers_and_ends(tiny_bundle: Path) -> None:
    with (
        serve_process(tiny_bundle, "--model-name", "eyes", "--threads", "1") as (process, url),
        OpenAI(base_url=url, api_key="unused", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["eyes"]
        asked = chat(model="eyes")
        whole = client.chat.completions.create(**asked).choices[0].message.content
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
        assert (process.returncode, rest) == (0, "")
        with pytest.raises(APIConnectionError):
            client.models.list()


def test_the_answers_are_the_bundle_s(tiny_bundle: Path) -> None:
    from fakes.watched_backend import SHORT, picture

    with load(tiny_bundle, threads=1) as fusion:
        expected = fusion.answer(picture(), "What?", sampling=SHORT)
    with serve_process(tiny_bundle, "--threads", "1") as (_, url), OpenAI(base_url=url, api_key="unused") as client:
        found = client.chat.completions.create(**chat(model=tiny_bundle.name))
    assert found.choices[0].message.content == expected.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_a_stream_finish(tiny_bundle: Path, number: signal.Signals) -> None:
    with serve_process(tiny_bundle) as (process, url), OpenAI(base_url=url, api_key="unused") as client:
        stream = client.chat.completions.create(**chat(model="tiny", max_tokens=400), stream=True)
        next(stream)
        process.send_signal(number)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        stream.close()
        assert process.wait(20) == 0


def test_a_second_signal_ends_at_once(tiny_bundle: Path) -> None:
    with serve_process(tiny_bundle, "--drain-seconds", "100") as (process, url):
        port = int(url.split(":")[2].split("/")[0])
        slow = socket.create_connection(("127.0.0.1", port))
        body = json.dumps(chat(model="tiny", max_tokens=400, stream=True)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        slow.sendall(head.encode() + b"\r\n\r\n" + body)
        slow.recv(100)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
        assert (process.returncode, rest) == (128 + signal.SIGTERM, "terminated\n")
        slow.close()


def test_a_signal_while_the_model_loads() -> None:
    code = """
import os, signal, time
from pathlib import Path
from fusion_edge.runtime.serve import engine
from fusion_edge.runtime.serve.app import make_app
from fusion_edge.runtime.serve.limits import RequestLimits
from fusion_edge.runtime.serve.server import Server, listen
from fusion_edge.runtime.serve.settings import ServeSettings

def load(*_, **__):
    while not server.started:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

engine.load = load
server = Server(make_app(ServeSettings(Path("unused"), "tiny")), RequestLimits(), 60, lambda: None)
server.run([listen("127.0.0.1", 0)])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "terminated\n")


def test_a_taken_port(tiny_bundle: Path, refused: Refused) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(serve.main, tiny_bundle, "--port", port)
    assert f"Port {port} of 127.0.0.1 is in use; stop the other program, or pass --port." in message


def test_a_port_for_root_alone(tiny_bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert "pass --port with 1024 or more" in refused(serve.main, tiny_bundle, "--port", "80")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7"])
def test_an_address_that_others_reach(tiny_bundle: Path, refused: Refused, host: str) -> None:
    assert "--api-key-file" in refused(serve.main, tiny_bundle, "--host", host, code=2)


def test_an_address_of_no_interface(tiny_bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert "--host ::1 is no address of this machine" in refused(serve.main, tiny_bundle, "--host", "::1", code=2)


@pytest.mark.parametrize("port", ["-1", "65536", "x", "8e3", "123456"])
def test_a_wrong_port(capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve.parser().parse_args(["bundle", f"--port={port}"])
    assert "is not a port from 0 to 65535" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(tmp_path: Path, refused: Refused) -> None:
    assert "bundle.json" in refused(serve.main, tmp_path)


def test_a_bundle_that_does_not_load(tiny_bundle: Path) -> None:
    command = [*SERVE, str(tiny_bundle), "--port", "0", "--device", "tensorrt"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    first, last = ended.stderr.splitlines()
    assert first.startswith("loading local folder")
    assert last.startswith("error: ")
    assert "tensorrt" in last


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("starlette", "uvicorn") else find(name)
    )
    assert entry.serve() == 1
    assert capsys.readouterr().err == (
        "error: starlette and uvicorn are not installed; run pip install '.[serve]' in a clone of fusion-edge.\n"
    )


def test_importing_fusion_edge_imports_no_server() -> None:
    code = (
        "import fusion_edge, sys; fusion_edge.load; sys.exit('starlette' in sys.modules or 'pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60).returncode == 0
