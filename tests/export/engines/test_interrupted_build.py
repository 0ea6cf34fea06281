"""Signals during a build: TensorRT is asked to stop, and the command ends soon."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.on_fake_tensorrt import installed
from support.paths import DEMO_CHECKPOINT
from support.uninterruptible_wait import UninterruptibleWait

from fusion_edge.export import cli
from fusion_edge.export.engines import cli as cli_build
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER
from fusion_edge.runtime.system import first_signals, interruptible


class Stopped(BaseException):
    """Raised by a signal handler."""


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny"))


@pytest.fixture(params=[True, False], ids=["polls", "silent"])
def trt(request: pytest.FixtureRequest) -> Iterator[FakeTensorRT]:
    """A build that does not end by itself; it calls the monitor from another thread, or never."""
    trt = FakeTensorRT(*RTX, FakeCuda())
    trt.wait = UninterruptibleWait(request.param)
    yield trt
    if not request.param:
        trt.wait.end()


class Signaller(threading.Thread):
    """Send a signal as soon as the build waits."""

    def __init__(self, wait: UninterruptibleWait, number: int) -> None:
        super().__init__()
        self._wait, self._number, self.sent = wait, number, 0.0
        self.start()

    def run(self) -> None:
        assert self._wait.began.wait(60)
        self.sent = time.monotonic()
        os.kill(os.getpid(), self._number)


def build(trt: FakeTensorRT, bundle: Path) -> int:
    with installed(trt):
        return cli_build.main([str(bundle), "--library=tensorrt-rtx", "--parts=1"])


class Gone(io.StringIO):
    """A closed terminal."""

    def flush(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(("number", "word"), first_signals.MESSAGES.items(), ids=str)
def test_signals(
    trt: FakeTensorRT,
    bundle: Path,
    number: signal.Signals,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """A build that never calls the monitor is abandoned, and the process exits, with or without a terminal."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert trt.wait is not None
    signaller = Signaller(trt.wait, number)
    assert build(trt, bundle) == 128 + number
    assert time.monotonic() - signaller.sent < 1
    assert capsys.readouterr().err.endswith(f"operators.\n{word}\n")
    assert list((bundle / ENGINES_FOLDER).iterdir()) == []
    assert exits == ([128 + number] if "silent" in request.node.name else [])
    assert interruptible.is_abandoned() == bool(exits)


def test_any_exception_of_waiting_thread_cancels(trt: FakeTensorRT, bundle: Path) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        assert trt.wait is not None
        signaller = Signaller(trt.wait, signal.SIGTERM)
        with pytest.raises(Stopped):
            build(trt, bundle)
        assert time.monotonic() - signaller.sent < 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list((bundle / ENGINES_FOLDER).iterdir()) == []


def test_interruptible_raises_error_of_work() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        interruptible.interruptible(fail, lambda: None)
    assert interruptible.interruptible(lambda: 3, lambda: None) == 3


@pytest.mark.parametrize("built", [0, 2], ids=["in the first engine", "in a later engine"])
def test_tensorrt_rtx(tmp_path: Path, built: int) -> None:
    """The real library may not call the monitor for seconds."""
    pytest.importorskip("tensorrt_rtx")
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(tmp_path / "b"), "--fp16", "--target=tensorrt"]) == 0
    files = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "fusion_edge.export.engines.cli", str(tmp_path / "b"), "--device=8.6"]
    with subprocess.Popen([*command, "--library=tensorrt-rtx"], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not _is_building(tmp_path / "b", built) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1)
        assert process.poll() is None
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - sent < 2  # a second on an idle machine
        assert process.stderr is not None
        assert process.stderr.read().endswith("interrupted\n")
    assert sorted(tmp_path.rglob("*")) == sorted([*files, tmp_path / "b" / ENGINES_FOLDER])


def _is_building(bundle: Path, built: int) -> bool:
    """Return whether engines are being built, and ``built`` of them are written."""
    return bool(list(bundle.rglob("*.partial"))) and len(list(bundle.rglob("*.engine"))) >= built
