"""The action ``Ask``, whose interfaces .ci/ros2 builds."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusion_edge.benchmarks.simulated_cameras import CHOICES, CHOOSING, QUESTIONS, SAMPLING, Frame
from fusion_edge.runtime import Fusion

pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
pytest.importorskip("fusion_edge_msgs", reason="fusion_edge_msgs is not built: run .ci/ros2")
from ros2.node.action_client import ABORTED, SUCCEEDED, Client
from ros2.node.robot import image, node_process
from sensor_msgs.msg import CompressedImage

COLOR, COUNT = QUESTIONS[1], QUESTIONS[0]


@pytest.fixture(scope="module", autouse=True)
def active(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An active node."""
    with node_process(tmp_path_factory.mktemp("node"), bundle=str(demo_bundle), capacity=1, autostart=True):
        yield


def test_a_picture_of_the_goal(client: Client, fusion: Fusion, small: tuple[Frame, ...]) -> None:
    status, result = client.result(image=image(small[1], 12), question=COLOR)
    assert (status, result.error, result.finish_reason) == (SUCCEEDED, "", "stop")
    assert result.text == fusion.answer(small[1], COLOR, sampling=SAMPLING).text
    assert (result.header.stamp.sec, result.header.frame_id) == (12, "front")
    client.robot.until(lambda: "".join(client.pieces).strip() == result.text)  # feedback may arrive after the result
    assert client.stages[0] == "preprocess"
    assert client.stages[-1] in ("prefill", "decode step")
    assert len(client.stages) == len(set(client.stages))


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
    status, result = client.result(image=image(small[0], 1), question=COUNT, schema=json.dumps(schema))
    assert (status, json.loads(result.json)) == (SUCCEEDED, fusion.json(small[0], COUNT, schema))


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
