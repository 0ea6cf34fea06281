"""sd_notify."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_a_socket_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError):
        notify("READY=1")


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
