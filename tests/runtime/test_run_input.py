"""Histories and questions of ``fusion-run`` that are damaged, endless or huge."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fusion_edge.runtime.cli import run as cli_run

Refuse = Callable[..., str]


@pytest.fixture
def options(tiny_bundle: Path, tmp_path: Path) -> list[str]:
    Image.new("RGB", (7, 5)).save(tmp_path / "image.png")
    return [str(tiny_bundle), "--image", str(tmp_path / "image.png"), "--max-new-tokens=2", "--threads=1"]


def test_a_history_with_a_byte_order_mark(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps([{"question": "a?", "answer": "é"}], ensure_ascii=False)
    answers = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "history.json").write_text(text, encoding)
        assert cli_run.main([*options, "--ask=What?", "--json", "--history", str(tmp_path / "history.json")]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answers"][0]["token_ids"])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (json.dumps([{"question": "a?", "answer": "b"}] * 2000), 1, "the context holds 512 with the answer"),
        (json.dumps([{"question": "a?", "answer": "b"}] * 300_000), 1, "bytes, more than any context; drop turns."),
        (json.dumps([{"question": "a?", "answer": "b" * 1_500_000}]), 1, "the context holds 512 with the answer"),
        ('[{"question": "a?", "answer": ' + "1" * 10_000 + "}]", 1, "Cannot read the history in"),
        ("[" + "[]," * 500_000 + "[]]", 2, "holds the entry []; expected"),
        ('[{"question": "<|end|>", "answer": "b"}]', 2, "The question is empty"),
        ("NaN", 2, "holds a JSON float"),
        ("[null]", 2, "holds the entry null"),
    ],
)
def test_histories_that_are_refused(
    options: list[str], tmp_path: Path, refused: Refuse, content: str, code: int, message: str
) -> None:
    (tmp_path / "history.json").write_text(content)
    started = time.monotonic()
    assert message in refused(cli_run.main, *options, "--ask=What?", "--history", tmp_path / "history.json", code=code)
    assert time.monotonic() - started < 5


def test_an_endless_history(options: list[str], refused: Refuse) -> None:
    assert "more than any context" in refused(cli_run.main, *options, "--ask=What?", "--history", "/dev/zero")


def test_a_history_from_a_pipe(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    text = json.dumps([{"question": "a?", "answer": "b"}])
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    assert cli_run.main([*options, "--ask=What?", "--history", str(tmp_path / "pipe")]) == 0
    writer.join()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"why " * 100_000, "the context holds 512 with the answer"),
        (b"x" * 5_000_000, "A question has more than 2097152 characters, more than any context; ask a shorter one."),
        ("\u200b\u2581".encode(), "The question is empty"),
        (b"<|end|>", "The question is empty"),
        (b"\0", "The question is empty"),
        (b"a\xc3", "The question is not valid Unicode"),
    ],
)
def test_lines_that_are_refused(
    options: list[str], refused: Refuse, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line + b"\nWhat?\n"), encoding="utf-8"))
    assert message in refused(cli_run.main, *options, code=1 if "positions" in message or "holds 512" in message else 2)
