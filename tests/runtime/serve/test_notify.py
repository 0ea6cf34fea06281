"""sd_notify."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serve_process import serve_process

from fusion_edge.runtime.serve.notify import feed_watchdog, notify, watchdog_seconds


@pytest.fixture(params=["file", "abstract"])
def channel(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """systemd's end of NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "file" else f"@fusion-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(name.replace("@", "\0"))
        bound.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield bound


def test_assignments_are_one_datagram(channel: socket.socket) -> None:
    notify("READY=1", "STATUS=serving demo")
    assert channel.recv(100) == b"READY=1\nSTATUS=serving demo"


def test_nothing_happens_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    notify("READY=1")


@pytest.mark.parametrize("address", ["gone", "@gone", "x" * 200, "vsock:2:3"])
def test_a_socket_that_is_gone_is_only_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1", "STATUS=x")
    (record,) = caplog.records
    assert record.getMessage().startswith("NOTIFY_SOCKET does not take READY=1 STATUS=x (")


def test_a_socket_that_nobody_reads_stops_nothing(channel: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    begin = time.monotonic()
    for _ in range(5000):
        if caplog.records:
            break
        notify("WATCHDOG=1")
    assert caplog.records
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("moment", ["before the start", "before the drain"])
def test_a_socket_that_is_gone_does_not_stop_the_drain(tiny_bundle: Path, tmp_path: Path, moment: str) -> None:
    path = tmp_path / "notify"
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTIFY_SOCKET", str(path))
        if moment == "before the start":
            bound.close()
            path.unlink()
        with serve_process(tiny_bundle) as (process, url):
            port = int(url.split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port), 20):
                pass  # it serves
            if moment == "before the drain":
                assert bound.recv(100) == b"READY=1"
                bound.close()
                path.unlink()
            process.send_signal(signal.SIGTERM)
            _, rest = process.communicate(timeout=20)
            assert process.returncode == 0
            assert "NOTIFY_SOCKET does not take STOPPING=1" in rest


@pytest.mark.parametrize(
    ("microseconds", "process", "seconds"),
    [
        ("30000000", "", 30.0),
        pytest.param("500000", str(os.getpid()), 0.5, id="this process"),
        ("500000", "1", None),
        ("", "", None),
        ("0", "", None),
        ("x", "", None),
    ],
)
def test_the_watchdogs_time(
    microseconds: str, process: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", process)
    assert watchdog_seconds() == seconds


def test_the_watchdog_is_fed(channel: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(feed_watchdog(), 0.1)

    asyncio.run(main())
    assert [channel.recv(100) for _ in range(4)] == [b"WATCHDOG=1"] * 4


def test_without_a_watchdog_nothing_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    asyncio.run(asyncio.wait_for(feed_watchdog(), 1))
