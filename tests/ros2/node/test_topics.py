"""Frames in, answers out, without the interfaces of fusion_edge_msgs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fusion_edge.benchmarks.simulated_cameras import CHOICES, CHOOSING, QUESTIONS, SAMPLING, Frame
from fusion_edge.runtime import Fusion

pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
from ros2.node.robot import Robot, node_process

COLOR, COUNT = QUESTIONS[1], QUESTIONS[0]
LONG = {"type": "string", "pattern": "^a{300}$"}
"""Schema of an answer that takes some hundred tokens."""


@pytest.fixture(scope="module")
def active(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An active node without a standing question."""
    folder = tmp_path_factory.mktemp("node")
    topics = ["image", "image/compressed"]
    with node_process(folder, bundle=str(demo_bundle), topics=topics, max_new_tokens=16, autostart=True, action=False):
        yield


@pytest.mark.usefixtures("active")
def test_questions(robot: Robot, fusion: Fusion, small: tuple[Frame, ...]) -> None:
    robot.wait_for_subscriber()
    robot.show_until_seen(small[3], 7)
    answer = robot.ask(question=COUNT, topic="image", id="first")
    assert answer["text"] == fusion.answer(small[3], COUNT, sampling=SAMPLING).text
    assert answer["stamp"] == {"sec": 7, "nanosec": 0}
    assert (answer["id"], answer["question"], answer["frame_id"]) == ("first", COUNT, "front")
    assert (answer["finish_reason"], answer["error"], answer["json"], answer["probabilities"]) == (
        "stop",
        None,
        None,
        None,
    )

    answer = robot.ask(question=CHOOSING, topic="image", choices=CHOICES)
    expected = fusion.choose(small[3], CHOOSING, CHOICES)
    assert answer["text"] == expected.text
    assert list(answer["probabilities"]) == list(CHOICES)
    for choice, probability in expected.probabilities.items():
        assert math.isclose(answer["probabilities"][choice], probability, rel_tol=1e-6)

    schema = {
        "type": "object",
        "properties": {"things": {"enum": ["one", "two", "three", "four"]}},
        "required": ["things"],
    }
    answer = robot.ask(question=COUNT, topic="image", schema=schema)
    assert answer["json"] == fusion.json(small[3], COUNT, schema)
    assert json.loads(answer["text"]) == answer["json"]

    answer = robot.ask(question=COUNT, topic="image", schema=LONG, max_new_tokens=400, deadline=0.05)
    assert answer["finish_reason"] == "deadline"
    assert "deadline" in answer["error"]
    answer = robot.ask(question=COUNT, topic="image", max_new_tokens=1)
    assert answer["finish_reason"] in ("length", "stop")


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize(
    ("document", "error"),
    [
        ("What?", "The question is not JSON"),
        ('{"topic": "image"}', "no member 'question'"),
        ('{"question": "What?", "topic": "rear"}', "The topic is 'rear'; expected one of image, image/compressed."),
        ('{"question": "What?", "topic": "image", "choices": ["yes"]}', "expected at least two"),
        ('{"question": "What?", "topic": "image", "schema": {"type": "text"}}', "'text'"),
    ],
)
def test_bad_questions(robot: Robot, small: tuple[Frame, ...], document: str, error: str) -> None:
    robot.wait_for_subscriber()
    robot.show_until_seen(small[0], 1)
    answer = robot.ask_text(document)
    assert (answer["finish_reason"], answer["text"]) == ("failed", "")
    assert error in answer["error"]


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_compressed_frames(robot: Robot, fusion: Fusion, small: tuple[Frame, ...], form: str) -> None:
    robot.wait_for_subscriber(compressed=True)
    file = io.BytesIO()
    Image.fromarray(small[2]).save(file, form)
    robot.show_compressed(file.getvalue(), 9, form)
    robot.until(lambda: robot.ask(question=COLOR, topic="image/compressed")["stamp"] == {"sec": 9, "nanosec": 0})
    assert robot.answers[-1]["text"] == fusion.answer(Image.open(file), COLOR, sampling=SAMPLING).text


@pytest.mark.usefixtures("active")
def test_a_damaged_picture(robot: Robot) -> None:
    robot.wait_for_subscriber(compressed=True)
    robot.show_compressed(b"GIF89a", 1)
    robot.until(lambda: "expected JPEG or PNG" in (robot.ask(question=COLOR, topic="image/compressed")["error"] or ""))
