"""Invalid images, questions, options and input of fusion-run and the Python API: one clear error each."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import ExifTags, Image

from fusion_edge.export import cli
from fusion_edge.runtime import AnswerStream, Fusion, FusionError, Sampling, Turn, UsageError, load
from fusion_edge.runtime.cli import run as cli_run

Refuse = Callable[..., str]
SHORT = Sampling(max_new_tokens=4)


def picture() -> Image.Image:
    """7 x 5 random pixels."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture().save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def refuse(tiny_bundle: Path, image: Path, refused: Refuse) -> Refuse:
    """``refuse(*options, image=..., ask="What?", code=1)`` returns the error of fusion-run."""

    def run(*options: object, image: object = image, ask: str = "What?", code: int = 1) -> str:
        arguments = (tiny_bundle, "--image", image, "--ask", ask, "--threads=1", *options)
        return refused(cli_run.main, *arguments, code=code)

    return run


@pytest.fixture(scope="module")
def fusion(tiny_bundle: Path) -> Iterator[Fusion]:
    with load(tiny_bundle, threads=1) as loaded:
        yield loaded


# Images -----------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """Return a PNG file that claims a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_images_that_cannot_be_read(refuse: Refuse, image: Path, tmp_path: Path) -> None:
    content = image.read_bytes()
    files = {
        "empty.png": (b"", "is not an image of a supported format"),
        "text.png": (b"no image", "is not an image of a supported format"),
        "truncated.png": (content[:-30], "cannot be decoded"),
        "header.png": (content[:20], "cannot be decoded"),
        "huge.png": (png(60_000, 60_000), "is too large"),
        "zero.png": (png(0, 10), "zero.png"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        error = refuse(image=tmp_path / name)
        assert message in error
        assert name in error
    assert "missing.png' does not exist; check the path" in refuse(image=tmp_path / "missing.png")
    assert "is a directory; pass the path of an image file" in refuse(image=tmp_path)
    assert "File name too long" in refuse(image="x" * 300)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "I;16", "1", "P"])
def test_every_pillow_mode(tiny_bundle: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.tif"
    (Image.new("I;16", (9, 4), 40_000) if mode == "I;16" else picture().convert(mode)).save(path)
    options = ["--ask=What?", "--max-new-tokens=2", "--threads=1"]
    assert cli_run.main([str(tiny_bundle), "--image", str(path), *options]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert err == ""


def test_rotated_and_tiny_images(fusion: Fusion, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = fusion.answer(tmp_path / "turned.png", "What?", sampling=SHORT)
    assert turned.token_ids == fusion.answer(picture(), "What?", sampling=SHORT).token_ids
    one = fusion.answer(Image.new("RGB", (1, 1), (9, 99, 200)), "What?", sampling=SHORT)
    assert one.token_ids == fusion.answer(np.full((3, 5, 3), (9, 99, 200), np.uint8), "What?", sampling=SHORT).token_ids


@pytest.mark.parametrize(
    "wrong",
    [
        np.full((4, 4, 3), 128, np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 3, 4, 4), np.uint8),
        np.zeros(3, np.uint8),
        np.zeros((4, 4, 3), np.int32),
        3,
        None,
        b"image.png",
        [[0]],
    ],
)
def test_wrong_types_of_images(fusion: Fusion, wrong: Any) -> None:
    with pytest.raises(UsageError, match="The image"):
        fusion.ask(wrong, "What?")
    with pytest.raises(UsageError, match="The image"):
        fusion.conversation(wrong)
    with pytest.raises(FusionError, match="is empty"):
        fusion.ask(np.zeros((0, 4, 3), np.uint8), "What?")
    with pytest.raises(UsageError, match="color is 'hsv'"):
        fusion.ask(picture(), "What?", color="hsv")  # type: ignore[arg-type]


# Questions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["", "  \n", "<image>", "<vision_start><latent_image><vision_end>"])
def test_an_empty_question(refuse: Refuse, ask: str) -> None:
    assert "The question is empty; ask something about the image" in refuse(ask=ask, code=2)


def test_a_question_with_invalid_utf_8(refuse: Refuse) -> None:
    assert "The question is not valid Unicode: character 1 is half" in refuse(ask=os.fsdecode(b"a\xff?"), code=2)


def test_a_question_that_exceeds_the_context(
    refuse: Refuse, tiny_checkpoint: Path, image: Path, tmp_path: Path
) -> None:
    message = refuse(ask="why " * 1000)
    assert "(16 of them image tokens), and the context holds 512 with the answer; ask a shorter question" in message
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "small"), "--max-context", "64"]) == 0
    with load(tmp_path / "small", threads=1) as fusion:
        answer = fusion.answer(image, "W", query_length=4)
        assert answer.prompt_tokens + len(answer.token_ids) <= 64
        assert answer.finish_reason in ("stop", "length")
        with pytest.raises(FusionError, match="the context holds 64 with the answer"):
            fusion.ask(image, "W" * 64)


@pytest.mark.parametrize(
    ("content", "message", "code"),
    [
        ("", "Cannot read the history", 1),
        ("[" * 100_000, "Cannot read the history", 1),
        ("{}", "holds a JSON dict; expected a JSON list", 2),
        ("[3]", "holds the entry 3; expected", 2),
        ('[["a", "b"]]', 'holds the entry ["a", "b"]', 2),
        ('[{"question": "a"}]', 'holds the entry {"question": "a"}', 2),
        ('[{"question": "a", "answer": null}]', "holds the entry", 2),
        ('[{"question": "a", "answer": "b", "extra": "c"}]', "holds the entry", 2),
        ('[{"question": " ", "answer": "b"}]', "The question is empty", 2),
        ('[{"question": "a", "answer": "\\ud800"}]', "An answer in the history is not valid Unicode", 2),
        (json.dumps([{"question": "a", "answer": "b " * 999}]), "the context holds 512 with the answer", 1),
    ],
)
def test_a_broken_history(refuse: Refuse, tmp_path: Path, content: str, message: str, code: int) -> None:
    (tmp_path / "history.json").write_text(content, encoding="utf-8")
    assert message in refuse("--history", tmp_path / "history.json", code=code)


def test_a_history_that_cannot_be_read(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "history.json").write_bytes(b"\xff")
    for path in (tmp_path / "history.json", tmp_path / "missing.json", tmp_path):
        assert "Cannot read the history in" in refuse("--history", path)


@pytest.mark.parametrize("history", [["a"], [("a", "b")], [{"question": "a", "answer": "b"}], "ab", 3, None])
def test_wrong_types_of_the_history(fusion: Fusion, history: Any) -> None:
    with pytest.raises(UsageError, match=r"The history is .*; expected a list of Turn\(question, answer\)"):
        fusion.ask(picture(), "What?", history=history)


@pytest.mark.parametrize("question", [None, 3, b"What?", ["What?"]])
def test_wrong_types_of_the_question(fusion: Fusion, question: Any) -> None:
    with pytest.raises(UsageError, match="The question is of type"):
        fusion.ask(picture(), question)
    with pytest.raises(UsageError, match="The question is of type"):
        fusion.answer(picture(), "What?", history=[Turn(question, "that")])


# Options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-new-tokens", "0", "max_new_tokens is 0; expected an integer from 1"),
        ("--temperature", "-1", "temperature is -1.0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--temperature", "inf", "temperature is inf"),
        ("--top-p", "0", "top_p is 0.0"),
        ("--top-p", "1.1", "top_p is 1.1"),
        ("--top-k", "-1", "top_k is -1"),
        ("--seed", "-1", "seed is -1"),
        ("--stop", "", "stop is ('',)"),
        ("--query-len", "144", "Query length 144 is not offered; choose from 16, 4"),
    ],
)
def test_an_option_out_of_range(refuse: Refuse, option: str, value: str, message: str) -> None:
    assert message in refuse(f"{option}={value}", code=2)


@pytest.mark.parametrize(
    "option",
    ["--device=tpu", "--threads=0", "--threads=two", "--query-len=0", "--top-k=1.5", "--max-new-tokens=", "--seed=x"],
)
def test_wrong_usage(tiny_bundle: Path, image: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli_run.main([str(tiny_bundle), "--image", str(image), "--ask", "What?", option])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fusion-run: error: argument {option.split('=')[0]}")


def test_json_without_a_question(tiny_bundle: Path, image: Path, refused: Refuse) -> None:
    assert "--json needs --ask TEXT" in refused(cli_run.main, tiny_bundle, "--image", image, "--json", code=2)


@pytest.mark.parametrize("sampling", ["greedy", 0, {"temperature": 1}])
def test_wrong_arguments(fusion: Fusion, sampling: Any) -> None:
    with pytest.raises(UsageError, match="expected a Sampling"):
        fusion.ask(picture(), "What?", sampling=sampling)
    for length in (9, "16", [16], 0):
        with pytest.raises(UsageError, match=r"Query length .* is not offered; choose from 16, 4"):
            fusion.ask(picture(), "What?", query_length=length)  # type: ignore[arg-type]


# Streams ----------------------------------------------------------------------------------------------------


def test_an_answer_that_another_question_ended(fusion: Fusion) -> None:
    first = fusion.stream(picture(), "What?", sampling=SHORT)
    next(first)
    with pytest.raises(UsageError, match="The question is empty"):
        fusion.ask(picture(), "")
    next(first)  # a refused question does not end the stream
    second = fusion.stream(picture(), "Where?", sampling=SHORT)
    for _ in range(2):
        with pytest.raises(FusionError, match="ended because another question was asked"):
            next(first)
    with pytest.raises(UsageError, match="The answer is not complete; take every piece of the stream first"):
        _ = first.answer
    pieces = list(second)
    assert "".join(pieces).strip() == second.answer.text
    assert second.answer.token_ids == fusion.answer(picture(), "Where?", sampling=SHORT).token_ids


def test_a_closed_model(tiny_bundle: Path) -> None:
    with load(tiny_bundle, threads=1) as fusion:
        stream = fusion.stream(picture(), "What?", sampling=SHORT)
        conversation = fusion.conversation(picture())
        next(stream)
        fusion.close()
        with pytest.raises(FusionError, match="The model was closed in stage"):
            next(stream)
        for ask in (lambda: fusion.ask(picture(), "What?"), lambda: conversation.answer("What?")):
            with pytest.raises(UsageError, match="has been closed; load the bundle again"):
                ask()


# Standard input and output ----------------------------------------------------------------------------------


def interactive(bundle: Path, image: Path, questions: bytes, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions), encoding="utf-8"))
    return cli_run.main([str(bundle), "--image", str(image), "--max-new-tokens=2", "--threads=1"])


def test_questions_from_standard_input(
    tiny_bundle: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interactive(tiny_bundle, image, b"\n  \nWhat is it?\n\n Where? ", monkeypatch) == 0
    out, err = capsys.readouterr()
    options = ["--ask=What is it?", "--ask=Where?", "--max-new-tokens=2", "--threads=1"]
    assert cli_run.main([str(tiny_bundle), "--image", str(image), *options]) == 0
    assert (out, err) == (capsys.readouterr().out, "")
    assert interactive(tiny_bundle, image, b"", monkeypatch) == 0
    assert capsys.readouterr() == ("", "")


def test_invalid_utf_8_on_standard_input(
    tiny_bundle: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interactive(tiny_bundle, image, b"What\xff?\nWhere?\n", monkeypatch) == 2
    assert capsys.readouterr() == ("", "error: The question is not valid Unicode: character 4 is half of a "
                                       "surrogate pair; remove it.\n")  # fmt: skip


def test_ctrl_c(
    tiny_bundle: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStream, "__next__", interrupt)
    assert cli_run.main([str(tiny_bundle), "--image", str(image), "--ask=What?", "--threads=1"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("output", ["closed pipe", "/dev/full", "ascii"])
def test_standard_output_that_cannot_be_written(tiny_bundle: Path, image: Path, output: str) -> None:
    code = "import sys; from fusion_edge.runtime.cli import run; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(tiny_bundle), "--image", str(image), "--ask=What?", "--ask=No?"]
    encoding = {"PYTHONIOENCODING": "ascii"} if output == "ascii" else {}
    reader, writer = os.pipe()
    target = os.open("/dev/full", os.O_WRONLY) if output == "/dev/full" else writer
    if output != "ascii":
        os.close(reader)
    done = subprocess.run(
        [*command, "--max-new-tokens=30", "--threads=1"],
        stdout=target,
        stderr=subprocess.PIPE,
        env=os.environ | encoding,
        check=False,
    )
    expected = {
        "closed pipe": (0, b""),
        "/dev/full": (1, b"error: Cannot access a file or standard output: No space left on device; "),
        "ascii": (0, b""),
    }[output]
    assert (done.returncode, done.stderr[: len(expected[1]) or None]) == expected
    assert done.stderr.count(b"\n") == done.returncode


def test_closed_standard_streams(tiny_bundle: Path, image: Path) -> None:
    code = "import sys; from fusion_edge.runtime.cli import run; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(tiny_bundle), "--image", str(image), "--threads=1", "--max-new-tokens=2"]
    shell = ["sh", "-c", 'exec "$@" <&- >&-', "sh"]
    for options in ([], ["--ask=What?"]):
        done = subprocess.run([*shell, *command, *options], stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_in_a_process(tiny_bundle: Path, image: Path) -> None:
    code = "import sys; from fusion_edge.runtime.cli import run; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(tiny_bundle), "--image", str(image), "--threads=1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"What?\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b"interrupted\n"
