"""Calibration samples: folders and files that are read, and errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fusion_edge.export.calibration.samples import FEWEST, QUESTIONS, read_samples
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.samples import LARGEST_FILE

COUNT = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty small images."""
    for i in range(COUNT):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    return tmp_path


def write(folder: Path, lines: list[object]) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def lines(count: int = COUNT) -> list[object]:
    return [{"image": f"{i:02}.png", "question": f"{i}?", "answer": str(i)} for i in range(count)]


def error(data: Path) -> str:
    with pytest.raises(FusionError) as caught:
        read_samples(data, 128, 16)
    return str(caught.value)


def test_folder_of_images(folder: Path) -> None:
    samples = read_samples(folder, 10, 5)
    everything = [*samples.calibrating, *samples.held_out]
    assert [sample.image.name for sample in everything] == [f"{i:02}.png" for i in range(15)]
    assert {sample.question for sample in everything} == set(QUESTIONS)
    assert len(samples.held_out) == 5
    assert all(sample.answer is None for sample in everything)


@pytest.mark.parametrize("given_as_folder", [True, False])
def test_jsonl_file(folder: Path, given_as_folder: bool) -> None:
    path = write(folder, lines())
    samples = read_samples(folder if given_as_folder else path, 128, 16)
    assert (len(samples.calibrating), len(samples.held_out)) == (18, 2)
    assert samples.held_out[-1].image == folder / "19.png"
    assert samples.held_out[-1].answer == "19"


def test_answers_and_empty_lines_are_optional(folder: Path) -> None:
    path = write(folder, [{"image": f"{i:02}.png", "question": "?"} for i in range(COUNT)])
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    assert read_samples(path, 10, 10).calibrating[0].answer is None


def test_minimum_number_of_samples(folder: Path) -> None:
    samples = read_samples(write(folder, lines(FEWEST)), 128, 16)
    assert (len(samples.calibrating), len(samples.held_out)) == (FEWEST - 1, 1)


def test_too_few_samples(folder: Path) -> None:
    message = error(write(folder, lines(FEWEST - 1)))
    assert f"{FEWEST - 1} samples" in message
    assert f"at least {FEWEST}" in message


def test_missing_or_empty_folder(tmp_path: Path) -> None:
    assert "does not exist" in error(tmp_path / "absent")
    assert "0 samples" in error(tmp_path)


def test_folder_with_two_jsonl_files(folder: Path) -> None:
    write(folder, lines())
    (folder / "other.jsonl").write_text("", encoding="utf-8")
    assert "2 JSONL files" in error(folder)


@pytest.mark.parametrize(
    "line",
    [
        "text",
        3,
        None,
        [],
        {},
        {"image": "00.png"},
        {"question": "?"},
        {"image": "00.png", "question": "?", "extra": ""},
        {"image": 3, "question": "?"},
        {"image": "00.png", "question": None},
        {"image": "00.png", "question": " "},
        {"image": "00.png", "question": "?", "answer": "\ud800"},
    ],
    ids=str,
)
def test_invalid_line(folder: Path, line: object) -> None:
    assert "Line 3 of" in error(write(folder, [*lines(2), line, *lines(10)]))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"image": '])
def test_file_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "samples.jsonl").write_bytes(content)
    assert "samples.jsonl" in error(folder)


def test_too_few_samples_requested(folder: Path) -> None:
    with pytest.raises(UsageError, match="add up to 6"):
        read_samples(folder, 4, 2)


def test_only_newlines_separate_lines(folder: Path) -> None:
    path = write(folder, lines())
    text = path.read_text(encoding="utf-8").replace("3?", "3\u2028\u0085?")
    path.write_text(text, encoding="utf-8-sig")
    assert read_samples(path, 128, 16).calibrating[3].question == "3\u2028\u0085?"


def test_deeply_nested_line(folder: Path) -> None:
    path = write(folder, lines())
    path.write_text("[" * 100_000 + "\n", encoding="utf-8")
    assert "Line 1 of" in error(path)


def test_unreadable_images(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "05.png").unlink()
    message = error(write(folder, lines()))
    assert "2 images" in message
    assert "03.png, 05.png" in message


@pytest.mark.parametrize("hidden", ["._03.png", ".trashed.jpg", "._samples.jsonl", ".DS_Store"])
def test_hidden_files_are_skipped(folder: Path, hidden: str) -> None:
    (folder / hidden).write_bytes(b"no picture")
    (folder / "Thumbs.db").write_bytes(b"no picture")
    samples = read_samples(folder, 128, 16)
    assert len(samples.calibrating) + len(samples.held_out) == COUNT


@pytest.mark.parametrize("address", ["http://host/x.png", "data:image/png;base64,iVBO"])
def test_urls_are_not_fetched(folder: Path, address: str) -> None:
    path = write(folder, [*lines(), {"image": address, "question": "?"}])
    assert f"Line {COUNT + 1} of {path} has the URL {address!r} as its image" in error(path)


def test_duplicate_field(folder: Path) -> None:
    path = write(folder, lines())
    path.write_text(path.read_text(encoding="utf-8") + '{"image": "00.png", "image": "01.png", "question": "?"}\n')
    assert f"Line {COUNT + 1} of {path} is not a sample" in error(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_samples_file_must_be_regular(folder: Path, kind: str) -> None:
    path = folder / "samples.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert f"{path} is a folder, pipe or device; expected a regular file" in error(folder)


def test_samples_file_too_large(folder: Path) -> None:
    path = write(folder, lines())
    os.truncate(path, LARGEST_FILE + 1)
    assert f"{path} has more than {LARGEST_FILE} bytes" in error(path)
