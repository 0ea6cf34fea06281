"""A client of the action ``Ask``."""

from __future__ import annotations

from typing import Any

from action_msgs.msg import GoalStatus
from fusion_edge_msgs.action import Ask
from rclpy.action import ActionClient
from ros2.node.robot import NODE, Robot

SUCCEEDED, ABORTED, CANCELED = GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_ABORTED, GoalStatus.STATUS_CANCELED


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
