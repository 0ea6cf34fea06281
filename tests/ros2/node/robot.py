"""A robot beside the node under test: camera, questions, answers, transitions. The node is a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

NODE = "/fusion_edge"
SECONDS = 60.0
"""Limit of every wait."""
TRANSITIONS = {
    "configure": Transition.TRANSITION_CONFIGURE,
    "activate": Transition.TRANSITION_ACTIVATE,
    "deactivate": Transition.TRANSITION_DEACTIVATE,
    "cleanup": Transition.TRANSITION_CLEANUP,
    "shutdown": Transition.TRANSITION_ACTIVE_SHUTDOWN,
}
RELIABLE = {f"qos_overrides./{topic}.subscription.reliability": "reliable" for topic in ("image", "image/compressed")}
"""Parameters for a machine so busy that sensor data is lost."""
PATIENT = {"max_frame_age": 60.0}
"""Parameters for a machine so busy that a test's questions are late."""
Document = dict[str, Any]


@contextmanager
def node_process(
    folder: Path, qos: Mapping[str, str] = RELIABLE, /, **parameters: object
) -> Iterator[subprocess.Popen[str]]:
    """Run the node with parameters, from a YAML file as users write it. Frames are reliable unless ``qos`` is empty."""
    file = folder / "parameters.yaml"
    document = {NODE: {"ros__parameters": {**qos, **PATIENT, **parameters}}}
    file.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "fusion_edge_ros", "--ros-args", "--params-file", str(file)]
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "RCUTILS_LOGGING_BUFFERED_STREAM": "0"}
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        sys.stderr.write((folder / "log").read_text(encoding="utf-8"))  # pytest shows it with a failure


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    """Send a signal; return the exit code."""
    os.kill(process.pid, number)
    return process.wait(SECONDS)


class Robot:
    """A node that talks to the node under test. All callbacks run in :meth:`until`."""

    def __init__(self) -> None:
        self.node = rclpy.create_node("robot")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self.answers: list[Document] = []
        self.diagnostics: list[Any] = []
        self.node.create_subscription(String, f"{NODE}/answer", self._answer, 100)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, 10)
        self._question = self.node.create_publisher(String, f"{NODE}/question", 10)
        reliable = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        self._image = self.node.create_publisher(Image, "/image", reliable)
        self._compressed = self.node.create_publisher(CompressedImage, "/image/compressed", reliable)

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()

    def until(self, condition: Callable[[], object], seconds: float = SECONDS) -> None:
        """Run callbacks until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "The condition does not hold in time."
            self._executor.spin_once(timeout_sec=0.02)

    def spin(self, seconds: float) -> None:
        """Run callbacks for a time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._executor.spin_once(timeout_sec=0.005)

    def wait(self, future: Any) -> Any:
        self.until(future.done)
        return future.result()

    # Frames

    def show(self, picture: npt.NDArray[np.uint8], stamp: int, encoding: str = "rgb8") -> None:
        """Publish a frame; its stamp is a number of seconds."""
        self._image.publish(image(picture, stamp, encoding))

    def subscribers(self) -> int:
        return int(self._image.get_subscription_count())

    def until_shown(self, picture: npt.NDArray[np.uint8], stamp: int) -> None:
        """Publish a frame until its answer comes: sensor data may be lost."""

        def is_answered() -> bool:
            self.show(picture, stamp)
            self.spin(0.3)
            return bool(self.answers) and self.answers[-1]["stamp"]["sec"] == stamp

        self.until(is_answered)

    def show_until_seen(self, picture: npt.NDArray[np.uint8], stamp: int) -> None:
        """Publish a frame until the node has it."""

        def is_seen() -> bool:
            self.show(picture, stamp)
            self.spin(0.1)
            answer = self.ask(question="What?", topic="image", max_new_tokens=1)
            return answer["stamp"] is not None and answer["stamp"]["sec"] == stamp

        self.until(is_seen)

    def show_compressed(self, data: bytes, stamp: int, form: str = "jpeg") -> None:
        message = CompressedImage(format=form)
        message.data = data
        message.header.stamp.sec = stamp
        self._compressed.publish(message)

    def wait_for_subscriber(self, compressed: bool = False) -> None:
        publisher = self._compressed if compressed else self._image
        self.until(lambda: publisher.get_subscription_count() == 1)

    # Questions

    def ask(self, **document: object) -> Document:
        """Ask a question of the topic; return its answer."""
        return self.ask_text(json.dumps(document))

    def ask_text(self, text: str) -> Document:
        self.until(lambda: self._question.get_subscription_count() == 1)
        self.answers.clear()
        self._question.publish(String(data=text))
        self.until(lambda: self.answers)
        return self.answers[-1]

    # Services

    def call(self, kind: Any, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, f"{NODE}/{name}")
        self.until(client.service_is_ready)
        try:
            return self.wait(client.call_async(request))
        finally:
            self.node.destroy_client(client)

    def transit(self, label: str) -> bool:
        """Request a transition; return whether it succeeds."""
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[label]
        return bool(self.call(ChangeState, "change_state", request).success)

    def state(self) -> str:
        return str(self.call(GetState, "get_state", GetState.Request()).current_state.label)

    def set_parameters(self, **values: Any) -> str:
        """Set parameters together; return the reason if the node refuses."""
        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParametersAtomically.Request(parameters=messages)
        result = self.call(SetParametersAtomically, "set_parameters_atomically", request).result
        return "" if result.successful else str(result.reason)

    def ask_now(self) -> tuple[bool, str]:
        response = self.call(Trigger, "ask_now", Trigger.Request())
        return bool(response.success), str(response.message)

    def diagnosis(self) -> Document:
        """Wait for the next diagnostics; return their values, with the level and the message."""
        self.diagnostics.clear()
        self.until(lambda: self.diagnostics)
        (status,) = self.diagnostics[-1].status
        assert status.name == "fusion_edge: answers"
        level = int.from_bytes(status.level, "little")
        return {"level": level, "message": status.message, **{pair.key: pair.value for pair in status.values}}

    def _answer(self, message: String) -> None:
        self.answers.append(json.loads(message.data))


def image(picture: npt.NDArray[np.uint8], stamp: int, encoding: str = "rgb8") -> Any:
    """Return a ``sensor_msgs/Image``; its stamp is a number of seconds."""
    height, width, channels = picture.shape
    message = Image(height=height, width=width, encoding=encoding, step=width * channels)
    message.data.frombytes(picture.tobytes())
    message.header.stamp.sec = stamp
    message.header.frame_id = "front"
    return message
