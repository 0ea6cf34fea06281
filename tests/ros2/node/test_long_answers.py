"""Goals that end before their answer: by a cancel, a deadline, a full queue or a node that stops."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterator

import pytest
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.benchmarks.simulated_cameras import QUESTIONS, Frame
from fusion_edge.export import cli

pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
pytest.importorskip("fusion_edge_msgs", reason="fusion_edge_msgs is not built: run .ci/ros2")
from fusion_edge_msgs.action import Ask
from ros2.node.action_client import ABORTED, CANCELED, SUCCEEDED, Client
from ros2.node.robot import image, node_process

COLOR, COUNT = QUESTIONS[1], QUESTIONS[0]
LONG = json.dumps({"type": "string", "pattern": "^a{300}$"})
"""Schema of an answer that takes some hundred tokens."""


@pytest.fixture(scope="module", autouse=True)
def active(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An active node, whose model takes seconds for such an answer: it has many layers."""
    folder = tmp_path_factory.mktemp("node")
    deep = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, layers=128))
    checkpoint = write_checkpoint(folder / "checkpoint", deep)
    assert cli.main([str(checkpoint), "-o", str(folder / "bundle"), "--int4"]) == 0
    with node_process(folder, bundle=str(folder / "bundle"), capacity=1, max_new_tokens=400, autostart=True):
        yield


def test_a_cancel_in_mid_answer(client: Client, small: tuple[Frame, ...]) -> None:
    handle = client.send(image=image(small[0], 1), question=COUNT, schema=LONG)
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
    running = client.send(image=image(small[0], 1), question=COUNT, schema=LONG)
    waiting = client.send(image=image(small[0], 1), question=COLOR)
    client.robot.wait(waiting.cancel_goal_async())
    assert client.end(waiting)[0] == CANCELED
    assert client.end(running)[0] == SUCCEEDED


def test_a_deadline(client: Client, small: tuple[Frame, ...]) -> None:
    start = time.monotonic()
    status, result = client.result(image=image(small[0], 1), question=COUNT, schema=LONG, deadline=0.2)
    assert (status, result.finish_reason) == (ABORTED, "deadline")
    assert "deadline" in result.error
    assert time.monotonic() - start < 2


def test_a_full_queue(client: Client, small: tuple[Frame, ...]) -> None:
    goal = Ask.Goal(image=image(small[0], 1), question=COUNT, schema=LONG)
    running = client.action.send_goal_async(goal, feedback_callback=client.feedback)
    client.robot.until(lambda: client.stages)
    futures = [running, *(client.action.send_goal_async(goal) for _ in range(2))]
    handles = [client.robot.wait(future) for future in futures]
    reasons = []
    for handle in reversed(handles):  # the last ones have been refused
        client.robot.wait(handle.cancel_goal_async())
        reasons.append(client.end(handle)[1].finish_reason)
    assert sorted(reasons) == ["cancelled", "cancelled", "refused"]


def test_a_standing_question_that_a_full_queue_refuses(client: Client, small: tuple[Frame, ...]) -> None:
    """Frames come at the camera's rate; an answer for each that is refused would bury the others."""
    robot = client.robot
    robot.wait_for_subscriber()
    assert robot.set_parameters(question=COLOR) == ""
    before = int(robot.diagnosis()["refused by the queue"])
    running = client.send(image=image(small[0], 1), question=COUNT, schema=LONG)
    robot.until(lambda: client.stages)
    waiting = client.send(image=image(small[0], 1), question=COUNT, schema=LONG)
    for number in range(5):
        robot.show(small[0], number)
        robot.spin(0.05)
    assert robot.answers == []
    answer = robot.ask(question=COLOR)  # whoever asks learns it
    assert (answer["finish_reason"], answer["text"]) == ("refused", "")
    assert robot.set_parameters(question="") == ""
    robot.until(lambda: int(robot.diagnosis()["refused by the queue"]) > before + 1)
    for handle in (waiting, running):
        robot.wait(handle.cancel_goal_async())
        client.end(handle)


def test_a_deactivated_node(client: Client, small: tuple[Frame, ...]) -> None:
    handle = client.send(image=image(small[0], 1), question=COUNT, schema=LONG)
    assert client.robot.transit("deactivate")
    status, result = client.end(handle)
    assert (status, result.finish_reason) == (ABORTED, "cancelled")
    assert not client.send(image=image(small[0], 1), question=COLOR).accepted
    assert client.robot.transit("activate")
    assert client.result(image=image(small[0], 1), question=COLOR)[0] == SUCCEEDED
