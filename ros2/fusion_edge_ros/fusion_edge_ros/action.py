"""The action server of ``fusion_edge_msgs/action/Ask``."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from fusion_edge_msgs.action import Ask
from rclpy.action.server import ActionServer, CancelResponse, GoalResponse
from rclpy.node import Node

from fusion_edge import FusionError, Request
from fusion_edge_ros.answering import Answering
from fusion_edge_ros.cameras import frame_of
from fusion_edge_ros.frames import Frame
from fusion_edge_ros.questions import Question, Reply, json_text, object_of_json, reply_of_error

RESULT_SECONDS = 10
"""Time for which a result is kept. Humble's default keeps each goal, and so its picture, for 15 minutes."""


class Asked(Protocol):
    """The node, as its action server sees it."""

    @property
    def answering(self) -> Answering | None:
        """None unless the node is active."""
        ...

    def newest(self, topic: str) -> Frame:
        """Return the newest frame of a topic. Raise :class:`FusionError` if there is none, or it is too old."""
        ...

    def with_defaults(self, question: Question) -> Question:
        """Return a question with the node's deadline, unless it has its own."""
        ...


class AskServer:
    """Answers goals without a thread of its own, for an executor of one thread.

    rclpy resumes a coroutine that waits in every turn of its executor, which would take a processor for as long as an
    answer takes. So a goal is executed when its answer is there: its status is ``ACCEPTED`` until then.
    """

    def __init__(self, node: Node, asked: Asked, name: str) -> None:
        self._node, self._asked = node, asked
        self._requests: dict[bytes, Request[Any] | None] = {}
        self._server = ActionServer(
            node,
            Ask,
            name,
            execute_callback=_no_result,
            goal_callback=self._accept,
            handle_accepted_callback=self._start,
            cancel_callback=self._cancel,
            result_timeout=RESULT_SECONDS,
        )

    @property
    def has_goals(self) -> bool:
        """Whether a goal has no result yet."""
        return bool(self._requests)

    def _accept(self, _goal: Any) -> GoalResponse:
        if self._asked.answering is not None:
            return GoalResponse.ACCEPT
        self._node.get_logger().warning("A goal is rejected: the node is not active.")
        return GoalResponse.REJECT

    def _start(self, goal_handle: Any) -> None:
        key = _key(goal_handle)
        self._requests[key] = None
        answering = self._asked.answering
        assert answering is not None  # one thread: nothing happens between _accept and this
        try:
            question = self._asked.with_defaults(_question(goal_handle.request))
            frame = self._frame(goal_handle.request)
        except FusionError as error:
            self._finish(goal_handle, None, reply_of_error(error))
            return
        feedback = Feedback(goal_handle)
        self._requests[key] = answering.ask(
            question,
            frame,
            lambda reply: self._schedule(goal_handle, frame, reply),
            priority=1,
            when_stage=feedback.stage,
            when_piece=feedback.piece,
        )

    def _cancel(self, goal_handle: Any) -> CancelResponse:
        request = self._requests.get(_key(goal_handle))
        if request is None:
            return CancelResponse.REJECT
        request.cancel()
        return CancelResponse.ACCEPT

    def _schedule(self, goal_handle: Any, frame: Frame, reply: Reply) -> None:
        """Finish a goal in the executor's thread, which alone may change its state."""
        executor = self._node.executor
        assert executor is not None  # it called _start
        executor.create_task(self._finish, goal_handle, frame, reply)

    def _finish(self, goal_handle: Any, frame: Frame | None, reply: Reply) -> None:
        del self._requests[_key(goal_handle)]
        goal_handle.execute(partial(_result, frame, reply))

    def _frame(self, goal: Any) -> Frame:
        for message in (goal.image, goal.compressed_image):
            if len(message.data):
                return frame_of(message)
        return self._asked.newest(goal.topic)


class Feedback:
    """Publishes stages and pieces of a goal's answer."""

    def __init__(self, goal_handle: Any) -> None:
        self._goal_handle, self._stage = goal_handle, ""

    def stage(self, stage: str) -> None:
        """Publish a stage, unless it is the last one: each token begins ``decode step``."""
        if stage != self._stage:
            self._stage = stage
            self._goal_handle.publish_feedback(Ask.Feedback(stage=stage))

    def piece(self, piece: str) -> None:
        """Publish a piece of text."""
        self._goal_handle.publish_feedback(Ask.Feedback(stage=self._stage, piece=piece))


def _question(goal: Any) -> Question:
    return Question(
        goal.question,
        topic=goal.topic,
        choices=tuple(goal.choices),
        schema=object_of_json("schema", goal.schema) if goal.schema else None,
        deadline=goal.deadline,
        max_new_tokens=goal.max_new_tokens,
    )


def _result(frame: Frame | None, reply: Reply, goal_handle: Any) -> Any:
    """End a goal that executes, and return its result."""
    result = Ask.Result(
        text=reply.text,
        json="" if reply.document is None else json_text(reply.document),
        choices=list(reply.probabilities),
        probabilities=list(reply.probabilities.values()),
        finish_reason=reply.finish_reason,
        error=reply.error,
    )
    if frame is not None:
        result.header = frame.header
    if goal_handle.is_cancel_requested:
        goal_handle.canceled()
    elif reply.error:
        goal_handle.abort()
    else:
        goal_handle.succeed()
    return result


def _no_result(_goal_handle: Any) -> Any:
    raise AssertionError("Goals are executed with a callback of their own.")


def _key(goal_handle: Any) -> bytes:
    return bytes(goal_handle.goal_id.uuid)
