"""Subscriptions as a robot gets them, and cameras that fall silent. The other tests have reliable frames."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from fusion_edge.benchmarks.simulated_cameras import QUESTIONS, Frame

pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
from fusion_edge_ros.cameras import Cameras
from rclpy.qos import DurabilityPolicy, HistoryPolicy, ReliabilityPolicy, qos_profile_sensor_data
from ros2.node.robot import Robot, image, node_process
from sensor_msgs.msg import Image

COLOR = QUESTIONS[1]
SILENT = (
    r"The newest frame on /image is ([0-9.]+) s old, and max_frame_age is 0.5 s; check that the camera still publishes."
)


def test_the_quality_of_service(robot: Robot) -> None:
    cameras = Cameras(robot.node, ["front", "front/compressed"], lambda topic, message: None)
    profiles = {one.topic_name: one.qos_profile for one in robot.node.subscriptions if "front" in one.topic_name}
    assert profiles.keys() == {"/front", "/front/compressed"}
    for profile in profiles.values():
        assert (profile.reliability, profile.durability) == (ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE)
        assert (profile.history, profile.depth) == (HistoryPolicy.KEEP_LAST, 1)
    cameras.close()


def test_a_camera_of_sensor_data(robot: Robot, demo_bundle: Path, small: tuple[Frame, ...], tmp_path: Path) -> None:
    """A best-effort publisher reaches no reliable subscription, so the node's own must be best effort."""
    with node_process(tmp_path, {}, bundle=str(demo_bundle), autostart=True, action=False):
        robot.until(lambda: robot.diagnosis()["state"] == "active")
        (endpoint,) = robot.node.get_subscriptions_info_by_topic("/image")
        assert (endpoint.node_name, endpoint.qos_profile.reliability, endpoint.qos_profile.durability) == (
            "fusion_edge",
            ReliabilityPolicy.BEST_EFFORT,
            DurabilityPolicy.VOLATILE,
        )
        camera = robot.node.create_publisher(Image, "/image", qos_profile_sensor_data)

        def is_seen() -> bool:
            camera.publish(image(small[0], 8))
            robot.spin(0.2)
            return int(robot.diagnosis()["frames"]) > 0

        robot.until(is_seen)
        assert robot.ask(question=COLOR, max_new_tokens=1)["stamp"] == {"sec": 8, "nanosec": 0}


def test_a_camera_that_falls_silent(robot: Robot, demo_bundle: Path, small: tuple[Frame, ...], tmp_path: Path) -> None:
    parameters = {"bundle": str(demo_bundle), "topics": ["image", "rear"], "autostart": True, "action": False}
    with node_process(tmp_path, **parameters):
        robot.wait_for_subscriber()
        robot.show_until_seen(small[0], 3)
        shown = time.monotonic()
        robot.until(lambda: float(robot.diagnosis()["age of /image (s)"]) >= 2)
        answer = robot.ask(question=COLOR, topic="image", max_new_tokens=1)
        assert 2 <= answer["age"] < time.monotonic() - shown + 1  # since the frame came, not since the question
        assert robot.diagnosis()["level"] == 0

        assert robot.set_parameters(max_frame_age=0.5) == ""
        answer = robot.ask(question=COLOR, topic="image")
        assert (answer["finish_reason"], answer["text"], answer["stamp"]) == ("failed", "", None)
        age = re.fullmatch(SILENT, answer["error"])
        assert age is not None
        assert float(age[1]) >= 2
        diagnosis = robot.diagnosis()
        assert diagnosis["level"] == 1
        assert re.search(r"no frame on /image for [0-9.]+ s, no frame on /rear for [0-9.]+ s", diagnosis["message"])

        assert robot.set_parameters(max_frame_age=0.0) == ""
        assert robot.ask(question=COLOR, topic="image", max_new_tokens=1)["stamp"]["sec"] == 3
        assert robot.diagnosis()["level"] == 0
