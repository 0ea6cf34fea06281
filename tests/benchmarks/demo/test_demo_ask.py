"""``./demo``: the picture in the terminal, answers with probabilities, and the time of each stage."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.demo_model import ANSWER, OTHER_ANSWER, OTHER_QUESTION, QUESTION
from support.paths import DEMO_CHECKPOINT, ROOT

from fusion_edge.benchmarks.demo import ask
from fusion_edge.benchmarks.demo.terminal_picture import CHUNK, COLUMNS, terminal_picture
from fusion_edge.export import cli


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(folder), "--int4"]) == 0
    return folder


def test_questions_behind_one_scene(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main([str(bundle), QUESTION, OTHER_QUESTION]) == 0
    lines = capsys.readouterr().out.splitlines()
    times = r"    {}[\d.]+ ms: {}"
    expected = [
        r".*benchmarks/demo/picture\.png",
        times.format("look ", r"preprocess [\d.]+, vision [\d.]+, alignment [\d.]+, prefill [\d.]+"),
        "",
        "> " + re.escape(QUESTION),
        rf"{ANSWER} \(\d+\.\d%\)",
        times.format("", r"alignment [\d.]+, prefill [\d.]+, decode [\d.]+"),
        "",
        "> " + re.escape(OTHER_QUESTION),
        rf"{OTHER_ANSWER} \(\d+\.\d%\)",
        times.format("", r"alignment [\d.]+, prefill [\d.]+, decode [\d.]+"),
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_the_script_asks_them() -> None:
    assert f'set -- "{QUESTION}" "{OTHER_QUESTION}"' in (ROOT / "demo").read_text(encoding="utf-8")


def test_the_answers_on_aarch64_are_of_this_model() -> None:
    for name in ("run", "output.txt"):
        assert QUESTION in (ROOT / "tests/aarch64" / name).read_text(encoding="utf-8"), "run tests/aarch64/run again"
    assert (ROOT / "tests/aarch64/output.txt").read_text(encoding="utf-8").splitlines().count(ANSWER) == 2


def test_a_missing_picture_is_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main([str(bundle), "What?", "--image", str(tmp_path / "none.png")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "none.png" in output.err


def test_kitty_gets_the_file_in_chunks() -> None:
    drawn = terminal_picture(ask.PICTURE, {"TERM": "xterm-kitty"})
    assert drawn is not None
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn)
    assert b64decode("".join(payload for _, payload in parts)) == ask.PICTURE.read_bytes()
    assert all(len(payload) <= CHUNK for _, payload in parts)
    assert [keys[-3:] for keys, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]


def test_kitty_gets_a_small_file_in_one_chunk(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    drawn = terminal_picture(tmp_path / "small.png", {"TERM": "xterm-ghostty"})
    assert drawn is not None
    assert re.fullmatch(r"\x1b_Ga=T,f=100,q=2,c=48,m=0;[^\x1b]*\x1b\\\n", drawn)


@pytest.mark.parametrize("program", ["iTerm.app", "WezTerm"])
def test_iterm_gets_the_file(program: str) -> None:
    drawn = terminal_picture(ask.PICTURE, {"TERM_PROGRAM": program, "COLORTERM": "truecolor"})
    assert drawn is not None
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);width=48:(.*)\x07\n", drawn)
    assert match
    assert b64decode(match[2]) == ask.PICTURE.read_bytes()
    assert int(match[1]) == len(ask.PICTURE.read_bytes())


def test_other_terminals_get_two_pixels_in_a_character(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (COLUMNS, COLUMNS, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    drawn = terminal_picture(tmp_path / "picture.png", {"COLORTERM": "truecolor"})
    assert drawn is not None
    lines = drawn.splitlines()
    assert len(lines) == COLUMNS // 2
    shown = np.array([re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", line) for line in lines], int)
    assert np.array_equal(shown[..., :3], pixels[::2])
    assert np.array_equal(shown[..., 3:], pixels[1::2])


def test_a_very_wide_picture_gets_a_line(tmp_path: Path) -> None:
    Image.new("RGB", (100, 1)).save(tmp_path / "picture.png")
    drawn = terminal_picture(tmp_path / "picture.png", {"COLORTERM": "truecolor"})
    assert drawn is not None
    assert drawn.count("▀") == COLUMNS


@pytest.mark.parametrize("environment", [{"TERM": "xterm"}, {"COLORTERM": "truecolor", "NO_COLOR": "1"}])
def test_a_terminal_without_color_gets_no_picture(environment: dict[str, str]) -> None:
    assert terminal_picture(ask.PICTURE, environment) is None


def test_a_picture_has_the_bytes_of_a_png() -> None:
    with Image.open(io.BytesIO(ask.PICTURE.read_bytes())) as image:
        assert image.format == "PNG"
