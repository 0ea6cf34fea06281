"""Nodes with a standing question, each a process of its own."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from fusion_edge.benchmarks.simulated_cameras import CHOICES, CHOOSING, QUESTIONS, SAMPLING, Frame
from fusion_edge.runtime import Fusion

pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
from ros2.node.robot import NODE, Robot, node_process, stop

COLOR = QUESTIONS[1]
FRAMES, RATE = 300, 30


def test_300_frames(robot: Robot, fusion: Fusion, demo_bundle: Path, shown: tuple[Frame, ...], tmp_path: Path) -> None:
    expected = [fusion.answer(frame, COLOR, sampling=SAMPLING).text for frame in shown]
    parameters = {"bundle": str(demo_bundle), "threads": 1, "question": COLOR, "autostart": True, "action": False}
    with node_process(tmp_path, **parameters) as process:
        robot.wait_for_subscriber()
        start = time.monotonic()
        for number in range(FRAMES):
            robot.show(shown[number % len(shown)], stamp=number)
            robot.spin(start + (number + 1) / RATE - time.monotonic())
        seconds = time.monotonic() - start
        robot.until_shown(shown[FRAMES % len(shown)], FRAMES)
        stamps = [answer["stamp"]["sec"] for answer in robot.answers]
        shown_once = [stamp for stamp in stamps if stamp < FRAMES]  # the last one may have been shown twice
        assert shown_once == sorted(set(shown_once))
        assert stamps == sorted(stamps)
        assert [answer["text"] for answer in robot.answers] == [expected[stamp % len(shown)] for stamp in stamps]
        rest = {(answer["topic"], answer["finish_reason"], answer["frame_id"]) for answer in robot.answers}
        assert rest == {("image", "stop", "front")}
        # Of the frames that came while the model was busy, only the newest was asked about.
        assert all(answer["age"] < 3 * seconds / len(stamps) + 0.5 for answer in robot.answers)
        diagnosis = robot.diagnosis()
        assert (diagnosis["level"], diagnosis["message"], diagnosis["device"]) == (0, "active", "cpu")
        assert 0 <= int(diagnosis["frames"]) - int(diagnosis["answered"]) - int(diagnosis["dropped frames"]) <= 2
        assert float(diagnosis["total p50 (ms)"]) > 0
        robot.until(lambda: int(robot.diagnosis()["answered"]) == len(robot.answers))
        assert stop(process, signal.SIGTERM) == 0


def test_live_parameters(
    robot: Robot, fusion: Fusion, demo_bundle: Path, small: tuple[Frame, ...], tmp_path: Path
) -> None:
    with node_process(tmp_path, bundle=str(demo_bundle), autostart=True, action=False):
        robot.wait_for_subscriber()
        assert robot.ask_now() == (False, "The parameter question is empty; set it to the question.")
        assert "exclude each other" in robot.set_parameters(question="What?", choices=["a", "b"], schema="{}")
        assert "out of range" in robot.set_parameters(deadline=-1.0)
        assert robot.set_parameters(question=CHOOSING, choices=list(CHOICES)) == ""
        success, message = robot.ask_now()
        assert not success
        assert "No frame has come on /image" in message
        robot.until_shown(small[1], 5)
        assert robot.answers[-1]["text"] == fusion.choose(small[1], CHOOSING, CHOICES).text
        robot.answers.clear()
        assert robot.ask_now() == (True, f"The answer will come on {NODE}/answer.")
        robot.until(lambda: robot.answers)
        assert robot.answers[-1]["stamp"]["sec"] == 5


def test_bad_frames(robot: Robot, demo_bundle: Path, small: tuple[Frame, ...], tmp_path: Path) -> None:
    with node_process(tmp_path, bundle=str(demo_bundle), question=COLOR, autostart=True, action=False):
        robot.wait_for_subscriber()

        def warned() -> bool:
            robot.show(small[0], 1, encoding="8UC3")
            diagnosis = robot.diagnosis()
            return bool(diagnosis["level"] == 1 and diagnosis["message"].endswith(" bad frames"))

        robot.until(warned)
        assert robot.answers == []
        assert "The image has the encoding '8UC3'; expected one of mono8" in (tmp_path / "log").read_text(
            encoding="utf-8"
        )
