"""The lifecycle node: configure loads the bundle, activate answers, deactivate stops, cleanup frees the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rclpy.action.server import RCLError
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from std_msgs.msg import String
from std_srvs.srv import Trigger

import fusion_edge
from fusion_edge import Fusion, FusionError, UsageError
from fusion_edge_ros.answering import Answering
from fusion_edge_ros.cameras import Cameras, frame_of
from fusion_edge_ros.diagnostics import Diagnostics
from fusion_edge_ros.frames import Frame
from fusion_edge_ros.parameters import declare_settings
from fusion_edge_ros.questions import Question, Reply, answer_json, question_of_json, reply_of_error
from fusion_edge_ros.settings import Settings

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
QUIET_SECONDS = 5.0
"""Time between two log messages about bad frames."""


class FusionEdgeNode(LifecycleNode):
    """Answers questions about camera frames. Use an executor of one thread; no callback but a transition waits."""

    def __init__(self, **options: Any) -> None:
        """Declare parameters, and make what exists in every state. ``options`` are those of rclpy's ``Node``.

        Raises:
            FusionError: Parameters do not fit together, or fusion_edge_msgs is missing.
            rclpy.exceptions.ParameterException: A parameter has a wrong type or is out of range.
        """
        super().__init__("fusion_edge", **options)
        try:
            self._set_up()
        except BaseException:
            self.destroy_node()
            raise

    def _set_up(self) -> None:
        _refuse_wrong_transitions(self)
        self.settings = declare_settings(self, self._change)
        self.answering: Answering | None = None
        self._fusion: Fusion | None = None
        self._cameras: Cameras | None = None
        self._diagnostics = Diagnostics()
        # Not a lifecycle publisher, which is silent unless the node is active: who asks must learn that it is not.
        self._answers = self.create_publisher(String, "~/answer", 10)
        self._statuses = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(String, "~/question", self._question, 10)
        self.create_service(Trigger, "~/ask_now", self._ask_now)
        self.create_timer(1.0, self._report)
        self._action = None
        if self.settings.action:
            try:
                from fusion_edge_ros.action import AskServer
            except ModuleNotFoundError as error:
                raise FusionError(
                    f"The action needs {error.name}, which is not there; build fusion_edge_msgs, or set the parameter "
                    "action to false."
                ) from None
            self._action = AskServer(self, self, "~/ask")

    @property
    def state(self) -> str:
        """Lifecycle state."""
        return self._diagnostics.state

    @property
    def has_goals(self) -> bool:
        """Whether a goal has no result yet."""
        return self._action is not None and self._action.has_goals

    def newest(self, topic: str) -> Frame:
        """Return the newest frame of a topic, as :meth:`Cameras.newest` does. Only in an active node."""
        assert self._cameras is not None
        return self._cameras.newest(topic, self.settings.max_frame_age)

    def with_defaults(self, question: Question) -> Question:
        """Return a question with the node's deadline, unless it has its own."""
        return replace(question, deadline=question.deadline or self.settings.deadline)

    # Transitions

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the bundle."""
        settings = self.settings
        try:
            if not settings.bundle:
                raise UsageError("The parameter bundle is empty; expected a folder, or a hub id org/name.")
            self._fusion = fusion_edge.load(
                settings.bundle,
                device=settings.device,
                threads=settings.threads,
                lock_memory=settings.lock_memory,
                cached_images=settings.cached_images,
            )
        except FusionError as error:
            self.get_logger().error(str(error))
            return FAILURE
        self._diagnostics.fusion, self._diagnostics.bundle = self._fusion, settings.bundle
        device = self._fusion.device
        self.get_logger().info(f"{settings.bundle} on {device.name}, CPU kernels: {device.kernels or 'none'}")
        return self._enter("inactive", super().on_configure(state))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe, and answer."""
        assert self._fusion is not None
        settings = self.settings
        self._diagnostics.activate()
        self.answering = Answering(
            self._fusion,
            capacity=settings.capacity,
            max_new_tokens=settings.max_new_tokens,
            query_length=settings.query_length,
        )
        self._cameras = Cameras(self, settings.topics, self._frame)
        return self._enter("active", super().on_activate(state))

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End all questions and subscriptions."""
        self._stop()
        return self._enter("inactive", super().on_deactivate(state))

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model."""
        self._free()
        return self._enter("unconfigured", super().on_cleanup(state))

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free, from any state."""
        self._stop()
        self._free()
        return self._enter("finalized", super().on_shutdown(state))

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free after a transition that failed unexpectedly; the node may be configured again."""
        self._stop()
        self._free()
        return self._enter("unconfigured", super().on_error(state))

    def _enter(self, state: str, result: TransitionCallbackReturn) -> TransitionCallbackReturn:
        if result == SUCCESS:
            self._diagnostics.state = state
        return result

    def _stop(self) -> None:
        cameras, self._cameras = self._cameras, None
        answering, self.answering = self.answering, None
        if cameras is not None:
            cameras.close()
        if answering is not None:
            answering.close()

    def _free(self) -> None:
        fusion, self._fusion, self._diagnostics.fusion = self._fusion, None, None
        if fusion is not None:
            fusion.close()

    # Callbacks

    def _change(self, settings: Settings) -> None:
        self.settings = settings

    def _frame(self, topic: str, message: Any) -> None:
        """Ask the standing question about a new frame."""
        self._diagnostics.frames += 1
        standing = self.settings.standing
        if standing is None:
            return
        try:
            frame = frame_of(message)
        except FusionError as error:
            self._diagnostics.bad_frames += 1
            self.get_logger().error(str(error), throttle_duration_sec=QUIET_SECONDS)
            return
        question = replace(standing, topic=topic)
        assert self.answering is not None  # only an active node subscribes
        self.answering.ask(question, frame, partial(self._publish_standing, question, frame), key=topic)

    def _question(self, message: String) -> None:
        """Ask a question of the topic about the newest frame."""
        question = Question("?")
        try:
            question = question_of_json(message.data)
            self._ask_newest(question)
        except FusionError as error:
            self._publish(question, None, reply_of_error(error))

    def _ask_now(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Ask the standing question about the newest frame of each topic. Fails if no topic can be asked about."""
        settings, errors = self.settings, list[str]()
        if settings.standing is None:
            response.success, response.message = False, "The parameter question is empty; set it to the question."
            return response
        for topic in settings.topics:
            try:
                self._ask_newest(replace(settings.standing, topic=topic))
            except FusionError as error:
                errors.append(str(error))
        response.success = len(errors) < len(settings.topics)
        come = [f"The answer will come on {self._answers.topic_name}."] if response.success else []
        response.message = " ".join([*come, *dict.fromkeys(errors)])
        return response

    def _ask_newest(self, question: Question) -> None:
        if self.answering is None:
            raise FusionError("The node is not active; activate it.")
        question, frame = self.with_defaults(question), self.newest(question.topic)
        self.answering.ask(question, frame, partial(self._publish, question, frame), priority=1)

    def _publish(self, question: Question, frame: Frame | None, reply: Reply) -> None:
        self._answers.publish(String(data=answer_json(question, reply, frame)))

    def _publish_standing(self, question: Question, frame: Frame, reply: Reply) -> None:
        """Publish an answer about a frame. Diagnostics count those that are replaced, or refused by a full queue."""
        if reply.finish_reason not in ("superseded", "refused"):
            self._publish(question, frame, reply)

    def _report(self) -> None:
        answering, cameras = self.answering, self._cameras
        latencies = None if answering is None else answering.latencies()
        ages = {} if cameras is None else cameras.ages()
        status = self._diagnostics.status(self.get_name(), latencies, ages, self.settings.max_frame_age)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._statuses.publish(message)


def _refuse_wrong_transitions(node: LifecycleNode) -> None:
    """Answer a transition that the state has not. Humble's and Jazzy's rclpy raise, and call back no more."""

    def guarded(callback: Callable[[Any, Any], Any], request: Any, response: Any) -> Any:
        try:
            return callback(request, response)
        except RCLError as error:
            node.get_logger().error(str(error))
            response.success = False
            return response

    for service in node.services:
        if service.srv_type is ChangeState:
            service.callback = partial(guarded, service.callback)
