"""Lifecycle transitions, and what the node does in each state."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fusion_edge.benchmarks.simulated_cameras import QUESTIONS, SAMPLING, Frame
from fusion_edge.runtime import Fusion, FusionError

pytest.importorskip("rclpy", reason="rclpy is not installed: run .ci/ros2")
from fusion_edge_ros.node import FusionEdgeNode
from fusion_edge_ros.settings import PARAMETERS, settings_of
from rclpy.exceptions import ParameterException
from rclpy.parameter import Parameter
from ros2.node.robot import SECONDS, Robot, node_process, stop

COLOR = QUESTIONS[1]
INACTIVE = "The node is not active; activate it."


def test_transitions(robot: Robot, fusion: Fusion, demo_bundle: Path, small: tuple[Frame, ...], tmp_path: Path) -> None:
    with node_process(tmp_path, bundle=str(demo_bundle), question=COLOR, action=False) as process:
        assert robot.state() == "unconfigured"
        assert robot.diagnosis()["message"] == "unconfigured"
        assert not robot.transit("activate")  # which the state has not
        assert robot.transit("configure")
        assert robot.state() == "inactive"
        diagnosis = robot.diagnosis()
        assert (diagnosis["device"], diagnosis["bundle"]) == ("cpu", str(demo_bundle))
        assert "frames" not in diagnosis
        assert robot.ask_now() == (False, INACTIVE)
        answer = robot.ask(question=COLOR, id="7")
        assert (answer["id"], answer["finish_reason"], answer["error"]) == ("7", "failed", INACTIVE)
        for _ in range(2):
            assert robot.transit("activate")
            robot.wait_for_subscriber()
            robot.answers.clear()
            robot.until_shown(small[0], 3)
            assert robot.answers[-1]["text"] == fusion.answer(small[0], COLOR, sampling=SAMPLING).text
            assert robot.transit("deactivate")
            robot.until(lambda: robot.subscribers() == 0)
            assert robot.ask_now() == (False, INACTIVE)
            assert robot.ask(question=COLOR)["error"] == INACTIVE
        assert robot.transit("cleanup")
        assert robot.state() == "unconfigured"
        assert robot.ask(question=COLOR)["error"] == INACTIVE
        assert "device" not in robot.diagnosis()
        assert robot.transit("configure")
        assert robot.transit("activate")
        assert robot.transit("shutdown")
        assert robot.state() == "finalized"
        assert stop(process) == 0


def test_a_missing_bundle(robot: Robot, demo_bundle: Path, tmp_path: Path) -> None:
    with node_process(tmp_path, action=False):
        assert not robot.transit("configure")
        assert robot.state() == "unconfigured"
        assert "The parameter bundle is empty" in (tmp_path / "log").read_text(encoding="utf-8")
        assert robot.set_parameters(bundle=str(demo_bundle)) == ""
        assert robot.transit("configure")


@pytest.mark.parametrize(("number", "autostart"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_signals(robot: Robot, demo_bundle: Path, tmp_path: Path, number: int, autostart: bool) -> None:
    with node_process(tmp_path, bundle=str(demo_bundle), autostart=autostart, action=False) as process:
        assert robot.state() == ("active" if autostart else "unconfigured")
        assert stop(process, number) == 0
        assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_failed_start(tmp_path: Path) -> None:
    with node_process(tmp_path, action=False, autostart=True) as process:
        assert process.wait(SECONDS) == 1
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "The parameter bundle is empty; expected a folder, or a hub id org/name." in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"threads": -1}, "threads out of range"),
        ({"deadline": 1e9}, "deadline out of range"),
        ({"capacity": "many"}, "'capacity'"),
        ({"topics": ["image", "image"]}, "topics is ['image', 'image']; expected the names of one or more topics"),
        (
            {"topics": ["front", "rear"], "capacity": 1},
            "capacity is 1; expected at least 2, one for each of the topics",
        ),
        ({"choices": ["yes", "no"]}, "choices and schema are for the parameter question, which is empty"),
        ({"question": "What?", "schema": "{"}, "schema is not JSON"),
    ],
)
def test_wrong_parameters(robot: Robot, parameters: dict[str, Any], error: str) -> None:
    overrides = [Parameter(name, value=value) for name, value in {"action": False, **parameters}.items()]
    with pytest.raises((FusionError, ParameterException), match=re.escape(error)):
        FusionEdgeNode(parameter_overrides=overrides)


def test_the_file_of_defaults(robot: Robot) -> None:
    file = Path(__file__).parents[3] / "ros2/fusion_edge_ros/config/fusion_edge.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()[3:]
    assert [line.strip(" #").partition(":")[0] for line in lines] == [parameter.name for parameter in PARAMETERS]
    node = FusionEdgeNode(cli_args=["--ros-args", "--params-file", str(file), "-p", "action:=false"])
    defaults = {parameter.name: parameter.default for parameter in PARAMETERS}
    assert node.settings == settings_of({**defaults, "action": False})
    node.destroy_node()


def test_without_interfaces(robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fusion_edge_ros.action", raising=False)
    monkeypatch.setitem(sys.modules, "fusion_edge_msgs", None)
    monkeypatch.setitem(sys.modules, "fusion_edge_msgs.action", None)
    with pytest.raises(FusionError, match="build fusion_edge_msgs, or set the parameter action to false"):
        FusionEdgeNode()
