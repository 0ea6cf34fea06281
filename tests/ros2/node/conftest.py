"""The real node, where rclpy is installed: .ci/ros2 runs these tests with several distributions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusion_edge.benchmarks.demo.pictures import scenes
from fusion_edge.benchmarks.simulated_cameras import Frame, frames
from fusion_edge.export import cli
from fusion_edge.runtime import Fusion, load

if TYPE_CHECKING:
    from ros2.node.action_client import Client
    from ros2.node.robot import Robot

CHECKPOINT = Path(__file__).parents[3] / "benchmarks/demo/checkpoint"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model exported with ``--int4``."""
    folder = tmp_path_factory.mktemp("ros2") / "demo"
    assert cli.main([str(CHECKPOINT), "-o", str(folder), "--int4"]) == 0
    return folder


@pytest.fixture(scope="session")
def fusion(demo_bundle: Path) -> Iterator[Fusion]:
    """The model in this process, which tells what the node must answer."""
    with load(demo_bundle, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def shown() -> tuple[Frame, ...]:
    """Frames ``[720,1280,3]`` in RGB."""
    return frames(8)


@pytest.fixture(scope="session")
def small() -> tuple[Frame, ...]:
    """Frames ``[256,256,3]`` in RGB, which arrive also on a busy machine."""
    return tuple(pixels for _, pixels in itertools.islice(scenes("held_out", 0), 8))


@pytest.fixture
def robot() -> Iterator[Robot]:
    rclpy = pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
    from ros2.node.robot import Robot

    rclpy.init()
    robot = Robot()
    yield robot
    robot.close()
    rclpy.shutdown()


@pytest.fixture
def client(robot: Robot) -> Iterator[Client]:
    """A client of the node's action."""
    from ros2.node.action_client import Client

    client = Client(robot)
    yield client
    client.action.destroy()
