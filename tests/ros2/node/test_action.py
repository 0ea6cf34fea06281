"""The action ``Ask``, whose interfaces .ci/ros2 builds."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusion_edge.benchmarks.simulated_cameras import CHOICES, CHOOSING, QUESTIONS, SAMPLING, Frame
from fusion_edge.runtime import Fusion

pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
pytest.importorskip("fusion_edge_msgs", reason="fusion_edge_msgs is not built: run .ci/ros2")
from action_msgs.msg import GoalStatus
from fusion_edge_msgs.action import Ask
from rclpy.action import ActionClient
from ros2.node.robot import NODE, Robot, image, node_process
from sensor_msgs.msg import CompressedImage

COLOR, SHAPES = QUESTIONS[1], QUESTIONS[0]
LONG = json.dumps({"type": "string", "pattern": "^a{300}$"})
"""Schema of an answer that takes some hundred tokens."""
SUCCEEDED, ABORTED, CANCELED = GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_ABORTED, GoalStatus.STATUS_CANCELED


@pytest.fixture(scope="module", autouse=True)
def active(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An active node."""
    with node_process(tmp_path_factory.mktemp("node"), bundle=str(demo_bundle), capacity=1, autostart=True):
        yield


class Client:
    """A client of the action."""

    def __init__(self, robot: Robot) -> None:
        self.robot = robot
        self.action = ActionClient(robot.node, Ask, f"{NODE}/ask")
        robot.until(self.action.server_is_ready)
        self.stages: list[str] = []
        self.pieces: list[str] = []

    def send(self, **goal: object) -> Any:
        """Send a goal; return its handle."""
        future = self.action.send_goal_async(Ask.Goal(**goal), feedback_callback=self.feedback)
        return self.robot.wait(future)

    def result(self, **goal: object) -> tuple[int, Any]:
        """Send a goal; return its last status and its result."""
        return self.end(self.send(**goal))

    def end(self, handle: Any) -> tuple[int, Any]:
        """Wait for the end of a goal; return its last status and its result."""
        assert handle.accepted
        response = self.robot.wait(handle.get_result_async())
        return response.status, response.result

    def feedback(self, message: Any) -> None:
        """Keep a stage or a piece."""
        if message.feedback.piece:
            self.pieces.append(message.feedback.piece)
        else:
            self.stages.append(message.feedback.stage)


@pytest.fixture
def client(robot: Robot) -> Iterator[Client]:
    client = Client(robot)
    yield client
    client.action.destroy()


def test_a_picture_of_the_goal(client: Client, fusion: Fusion, small: tuple[Frame, ...]) -> None:
    status, result = client.result(image=image(small[1], 12), question=COLOR)
    assert (status, result.error, result.finish_reason) == (SUCCEEDED, "", "stop")
    assert result.text == fusion.answer(small[1], COLOR, sampling=SAMPLING).text
    assert (result.header.stamp.sec, result.header.frame_id) == (12, "front")
    assert client.stages[0] == "preprocess"
    assert client.stages[-1] in ("prefill", "decode step")
    assert len(client.stages) == len(set(client.stages))
    assert "".join(client.pieces).strip() == result.text


def test_a_compressed_picture(client: Client, fusion: Fusion, small: tuple[Frame, ...]) -> None:
    file = io.BytesIO()
    Image.fromarray(small[1]).save(file, "png")
    status, result = client.result(compressed_image=CompressedImage(format="png", data=file.getvalue()), question=COLOR)
    assert (status, result.text) == (SUCCEEDED, fusion.answer(small[1], COLOR, sampling=SAMPLING).text)


def test_the_newest_frame(client: Client, fusion: Fusion, small: tuple[Frame, ...]) -> None:
    client.robot.wait_for_subscriber()
    client.robot.show_until_seen(small[4], 40)
    client.robot.show_until_seen(small[5], 50)
    for topic in ("", "image"):
        status, result = client.result(topic=topic, question=COLOR)
        assert (status, result.header.stamp.sec) == (SUCCEEDED, 50)
        assert result.text == fusion.answer(small[5], COLOR, sampling=SAMPLING).text


def test_a_choice(client: Client, fusion: Fusion, small: tuple[Frame, ...]) -> None:
    status, result = client.result(image=image(small[0], 1), question=CHOOSING, choices=list(CHOICES))
    expected = fusion.choose(small[0], CHOOSING, CHOICES)
    assert (status, result.text, tuple(result.choices)) == (SUCCEEDED, expected.text, CHOICES)
    for probability, other in zip(result.probabilities, expected.probabilities.values(), strict=True):
        assert math.isclose(probability, other, rel_tol=1e-6)


def test_a_schema(client: Client, fusion: Fusion, small: tuple[Frame, ...]) -> None:
    schema = {"enum": ["one", "two", "three", "four"]}
    status, result = client.result(image=image(small[0], 1), question=SHAPES, schema=json.dumps(schema))
    assert (status, json.loads(result.json)) == (SUCCEEDED, fusion.json(small[0], SHAPES, schema))


def test_a_cancel_in_mid_answer(client: Client, small: tuple[Frame, ...]) -> None:
    handle = client.send(image=image(small[0], 1), question=SHAPES, schema=LONG)
    client.robot.until(lambda: client.stages[-1:] == ["decode step"])
    start = time.monotonic()
    response = client.robot.wait(handle.cancel_goal_async())
    assert len(response.goals_canceling) == 1
    status, result = client.end(handle)
    seconds = time.monotonic() - start
    assert (status, result.finish_reason) == (CANCELED, "cancelled")
    assert re.fullmatch('("a{0,299})?', result.text)
    assert re.search("cancelled after [1-9][0-9]* tokens, within the JSON document", result.error)
    assert seconds < 1
    # What has ended cannot be canceled, and the node answers the next goal.
    assert len(client.robot.wait(handle.cancel_goal_async()).goals_canceling) == 0
    assert client.result(image=image(small[0], 1), question=COLOR)[0] == SUCCEEDED


def test_a_cancel_while_it_waits(client: Client, small: tuple[Frame, ...]) -> None:
    running = client.send(image=image(small[0], 1), question=SHAPES, schema=LONG)
    waiting = client.send(image=image(small[0], 1), question=COLOR)
    client.robot.wait(waiting.cancel_goal_async())
    assert client.end(waiting)[0] == CANCELED
    assert client.end(running)[0] == SUCCEEDED


def test_a_deadline(client: Client, small: tuple[Frame, ...]) -> None:
    start = time.monotonic()
    status, result = client.result(image=image(small[0], 1), question=SHAPES, schema=LONG, deadline=0.2)
    assert (status, result.finish_reason) == (ABORTED, "deadline")
    assert "deadline" in result.error
    assert time.monotonic() - start < 2


def test_a_full_queue(client: Client, small: tuple[Frame, ...]) -> None:
    goal = Ask.Goal(image=image(small[0], 1), question=SHAPES, schema=LONG)
    running = client.action.send_goal_async(goal, feedback_callback=client.feedback)
    client.robot.until(lambda: client.stages)
    futures = [running, *(client.action.send_goal_async(goal) for _ in range(2))]
    handles = [client.robot.wait(future) for future in futures]
    reasons = []
    for handle in reversed(handles):  # the last ones have been refused
        client.robot.wait(handle.cancel_goal_async())
        reasons.append(client.end(handle)[1].finish_reason)
    assert sorted(reasons) == ["cancelled", "cancelled", "refused"]


@pytest.mark.parametrize(
    ("goal", "error"),
    [
        ({"question": ""}, "The question is empty"),
        ({"question": COLOR, "topic": "rear"}, "The topic is 'rear'; expected one of image."),
        ({"question": COLOR, "choices": ["yes", "no"], "schema": "{}"}, "exclude each other"),
        ({"question": COLOR, "schema": "[]"}, "expected a JSON object"),
        ({"question": COLOR, "deadline": -1.0}, "deadline is -1.0"),
        ({"question": COLOR, "image": {"encoding": "8UC3"}}, "The image has the encoding '8UC3'"),
        ({"question": COLOR, "image": {"step": 5}}, "The image has a step of 5 bytes"),
        ({"question": COLOR, "image": {}, "choices": ["yes"]}, "expected at least two"),
        ({"question": COLOR, "compressed_image": b"GIF89a"}, "expected JPEG or PNG"),
    ],
)
def test_bad_goals(client: Client, small: tuple[Frame, ...], goal: dict[str, Any], error: str) -> None:
    if "image" in goal:
        message = image(small[0], 1)
        for name, value in goal["image"].items():
            setattr(message, name, value)
        goal = {**goal, "image": message}
    if "compressed_image" in goal:
        goal = {**goal, "compressed_image": CompressedImage(format="gif", data=goal["compressed_image"])}
    status, result = client.result(**goal)
    assert (status, result.finish_reason, result.text) == (ABORTED, "failed", "")
    assert error in result.error


def test_a_deactivated_node(client: Client, small: tuple[Frame, ...]) -> None:
    handle = client.send(image=image(small[0], 1), question=SHAPES, schema=LONG)
    assert client.robot.transit("deactivate")
    status, result = client.end(handle)
    assert (status, result.finish_reason) == (ABORTED, "cancelled")
    assert not client.send(image=image(small[0], 1), question=COLOR).accepted
    assert client.robot.transit("activate")
    assert client.result(image=image(small[0], 1), question=COLOR)[0] == SUCCEEDED
