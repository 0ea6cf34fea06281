"""Signals end commands with an exit code, one line and a complete cleanup. Other handlers are kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import onnxruntime as ort
import pytest
from support.demo_model import PICTURE
from support.uninterruptible_wait import UninterruptibleWait

from fusion_edge.export import cli as export_cli
from fusion_edge.export.bundle.data_writer import DataWriter
from fusion_edge.export.calibration.work_folder import work_folder
from fusion_edge.runtime.backends.onnxruntime.graph import Graph
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.system import signals
from fusion_edge.runtime.system.progress import Progress

ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]
ends = pytest.mark.parametrize(("number", "code", "said"), ENDS)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@ends
def test_signals_end_a_command(
    number: signal.Signals, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def command(_: Any) -> int:
        try:
            send(number)
            time.sleep(5)
        finally:
            for again, _code, _said in ENDS:  # nothing interrupts the cleanup
                send(again)
            cleaned.append(True)
        return 0

    before = [signal.getsignal(each) for each, _code, _said in ENDS]
    assert run_command(command, None) == code  # type: ignore[arg-type]
    assert capsys.readouterr().err == f"{said}\n"
    assert cleaned
    assert [signal.getsignal(each) for each, _code, _said in ENDS] == before


def test_held_signals_wait_for_the_end_of_the_block() -> None:
    done = []

    def work() -> None:
        with signals.held(), signals.held():
            send(signal.SIGTERM)
            done.append("all of it")

    with signals.raising(), pytest.raises(signals.Terminated) as ended:
        work()
    assert done
    assert ended.value.code == 143


def test_handlers_of_the_program_are_kept() -> None:
    """Ignored signals (nohup), signals that a program handles, and all signals in another thread."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with signals.raising():
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda _: 7, None)))  # type: ignore[arg-type]
    thread.start()
    thread.join()
    assert codes == [7]


def test_the_library_installs_no_handlers() -> None:
    program = (
        "import signal, fusion_edge.runtime, fusion_edge.export.cli, fusion_edge.benchmarks, fusion_edge.kernels\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@ends
@pytest.mark.parametrize("how", ["command", "module"])
def test_signals_while_modules_load(number: signal.Signals, code: int, said: str, how: str, tmp_path: Path) -> None:
    """A module that sleeps replaces NumPy, the first slow import."""
    (tmp_path / "numpy.py").write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)\n")
    start = {
        "command": ["-c", "from fusion_edge.runtime.cli.entry import run; run()"],
        "module": ["-m", "fusion_edge.runtime.cli.run"],
    }
    process = subprocess.Popen(
        [sys.executable, *start[how]],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == f"{said}\n"
    assert process.returncode == code


def test_pending_work_is_canceled(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal arrives during hundreds of slow blocks, and during an endless checksum."""
    write, calls = DataWriter._write_block, []

    def slow(*arguments: Any) -> Any:
        calls.append(time.monotonic())
        if len(calls) == 3:
            send(signal.SIGINT)
        time.sleep(0.1)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DataWriter, "_write_block", slow)
        assert export_cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b")]) == 130
    assert len(calls) < 20
    started: list[float] = []

    def endless(_path: Path, advance: Callable[[int], None]) -> str:
        if not started:
            started.append(time.monotonic())
            send(signal.SIGTERM)
        while True:
            advance(1)
            time.sleep(0.01)

    monkeypatch.setattr("fusion_edge.export.bundle.writer.digest", endless)
    assert export_cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b")]) == 143
    assert time.monotonic() - started[0] < 5
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "interrupted\nterminated\n"


def test_a_calibration_keeps_finished_work(tmp_path: Path) -> None:
    def calibrate() -> None:
        with work_folder(tmp_path / "b", "command") as folder:
            (folder / "llm.block.json").touch()
            raise signals.Terminated(signal.SIGTERM)

    with pytest.raises(signals.Terminated):
        calibrate()
    with work_folder(tmp_path / "b", "command") as folder:
        assert (folder / "llm.block.json").exists()


def test_ctrl_c_in_an_answer_goes_back_to_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal: Ctrl-C interrupts two answers, then the prompt."""
    asked: list[str] = []

    def say(question: str) -> None:
        asked.append(question)
        if len(asked) < 3:
            send(signal.SIGINT)
            time.sleep(5)

    class Terminal:
        lines = iter(["one\n", "two\n", "three\n"])

        def isatty(self) -> bool:
            return True

        def readline(self, _size: int) -> str:
            line = next(self.lines, None)
            if line is None:
                send(signal.SIGINT)
                time.sleep(5)
            return line or ""

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert run_command(lambda _: cli_run._interactive(say), None) == 130  # type: ignore[arg-type]
    assert asked == ["one", "two", "three"]
    assert capsys.readouterr().err == "> \n> \n> > interrupted\n"


@ends
def test_ctrl_c_ends_a_run_of_onnx_runtime(
    number: signal.Signals,
    code: int,
    said: str,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A graph is one call of ONNX Runtime, during which Python handles no signals."""
    wait, sent = UninterruptibleWait(polls=False), []

    def run(*_: Any) -> NoReturn:
        wait.until_refused(None)
        raise RuntimeError("terminated by request")

    def send_in_the_middle() -> None:
        assert wait.began.wait(60)
        sent.append(time.monotonic())
        send(number)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)
    monkeypatch.setattr(Graph, "interrupt", lambda _, terminate=True: wait.end() if terminate else None)
    threading.Thread(target=send_in_the_middle).start()
    assert cli_run.main([str(tiny_bundle), "--image", str(PICTURE), "--ask", "What is it?"]) == code
    assert time.monotonic() - sent[0] < 1
    assert capsys.readouterr() == ("", f"{said}\n")


def test_a_closed_terminal_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def isatty(self) -> bool:
            return True

        def write(self, _text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sys, "stderr", Closed())
    with Progress("Writing", 10) as progress:
        progress._shown = 0
        progress.advance(5)
        progress.advance(5)
    assert progress.done == 10


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "<&-", ">/dev/full", ">/dev/full 2>&1", "2>/dev/full", "| true"])
def test_standard_streams_that_cannot_be_written(closed: str, tiny_bundle: Path) -> None:
    command = f"'{sys.executable}' -m fusion_edge.runtime.cli.info '{tiny_bundle}' {closed}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if ">/dev/full" in closed and not closed.startswith("2") else 0)
    assert len(done.stderr.splitlines()) == (closed == ">/dev/full")
