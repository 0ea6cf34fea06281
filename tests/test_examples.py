"""Every example runs on the demo model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.demo_model import BACKGROUND_QUESTION, OTHER_QUESTION, PICTURE, QUESTION

from fusion_edge.export import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model exported with ``--int4``."""
    folder = tmp_path_factory.mktemp("examples") / "demo"
    assert cli.main([str(ROOT / "benchmarks/demo/checkpoint"), "-o", str(folder), "--int4"]) == 0
    return folder


def run(example: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an example as a user does."""
    command = [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in text for path in (ROOT / "examples").glob("*.py"))


def test_ask_picture(demo_bundle: Path) -> None:
    result = run("ask_picture.py", demo_bundle, PICTURE, QUESTION, OTHER_QUESTION)
    assert len(result.stdout.splitlines()) == 2


def test_camera_loop(demo_bundle: Path) -> None:
    result = run("camera_loop.py", demo_bundle, BACKGROUND_QUESTION, "--frames", 5, "--rate", 5)
    *answers, latencies = result.stdout.splitlines()
    assert 1 <= len(answers) <= 5
    assert all(answer.startswith("red (stop, frame ") for answer in answers)
    assert f", {len(answers)} answered" in latencies


CAMERA = """
import numpy as np
CAP_GSTREAMER, CAP_PROP_BUFFERSIZE = 1800, 38
class VideoCapture:
    def __init__(self, source, backend=None):
        print("opened", repr(source), backend)
        self.left = 3
    def isOpened(self):
        return True
    def set(self, name, value):
        print("set", name, value)
    def read(self):
        self.left -= 1
        return self.left >= 0, np.full((72, 64), 128, np.uint8)
    def release(self):
        print("released")
"""
"""A stand-in for OpenCV: a camera with three gray frames in NV12."""


@pytest.mark.parametrize(
    ("source", "opened"),
    [("0", "0 None"), ("drive.mp4", "'drive.mp4' None"), ("v4l2src ! appsink", "'v4l2src ! appsink' 1800")],
)
def test_camera_loop_with_a_camera(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, opened: str
) -> None:
    (tmp_path / "cv2.py").write_text(CAMERA, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run("camera_loop.py", demo_bundle, OTHER_QUESTION, "--camera", source, "--color", "nv12")
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"opened {opened}", "set 38 1"]
    assert "released" in lines
    assert "failed" not in lines[-1]


def test_asyncio_robot(demo_bundle: Path) -> None:
    result = run("asyncio_robot.py", demo_bundle, BACKGROUND_QUESTION, "--seconds", 3)
    *answers, summary = result.stdout.splitlines()
    assert set(answers) == {"front: red (stop)", "rear: blue (stop)"}
    assert summary.startswith("longest delay of a tick: ")


def test_folder_to_jsonl(demo_bundle: Path, tmp_path: Path) -> None:
    shutil.copy(PICTURE, tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("ignored", encoding="utf-8")
    result = run("folder_to_jsonl.py", demo_bundle, tmp_path, QUESTION)
    (line,) = map(json.loads, result.stdout.splitlines())
    assert line["image"] == "a.png"
    assert line["answer"]
    assert "b.png" in result.stderr
