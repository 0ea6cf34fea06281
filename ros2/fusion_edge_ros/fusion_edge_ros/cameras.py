"""Subscriptions to the topics of frames; of each, the newest message is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage, Image

from fusion_edge import FusionError, UsageError
from fusion_edge_ros.frames import Frame, compressed_frame, raw_frame

COMPRESSED_SUFFIX = "/compressed"
"""End of the names of topics that image_transport compresses."""


def sensor_data() -> QoSProfile:
    """Return the quality of service of sensor data of which only the newest message counts."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.VOLATILE,
    )


def frame_of(message: Any) -> Frame:
    """Return the frame of an image message. Raise :class:`FusionError` as the functions of ``frames`` do."""
    return compressed_frame(message) if isinstance(message, CompressedImage) else raw_frame(message)


class Cameras:
    """The newest message of each topic."""

    def __init__(self, node: Node, topics: Sequence[str], when_frame: Callable[[str, Any], object]) -> None:
        """Subscribe. ``when_frame`` gets the topic's name as in ``topics``, and the message."""
        self._node, self._when_frame = node, when_frame
        self._newest: dict[str, Any] = dict.fromkeys(topics)
        self._received = dict.fromkeys(topics, time.monotonic())
        self._subscriptions = [
            node.create_subscription(
                CompressedImage if node.resolve_topic_name(topic).endswith(COMPRESSED_SUFFIX) else Image,
                topic,
                partial(self._keep, topic),
                sensor_data(),
                qos_overriding_options=QoSOverridingOptions([QoSPolicyKind.RELIABILITY]),
            )
            for topic in topics
        ]

    def newest(self, topic: str, max_age: float) -> Frame:
        """Return the newest frame of a topic, or of the only one for an empty name.

        Args:
            topic: The topic, as in ``topics``.
            max_age: Limit of its age in seconds; 0 for none.

        Raises:
            UsageError: There is no such topic.
            FusionError: No frame has come, it is too old, or it is no picture for the model.
        """
        names = list(self._newest)
        if not topic and len(names) == 1:
            topic = names[0]
        if topic not in self._newest:
            raise UsageError(f"The topic is {topic!r}; expected one of {', '.join(names)}.")
        message, received = self._newest[topic], self._received[topic]
        name = self._node.resolve_topic_name(topic)
        if message is None:
            raise FusionError(f"No frame has come on {name}; check that it is published.")
        age = time.monotonic() - received
        if 0 < max_age < age:
            raise FusionError(
                f"The newest frame on {name} is {age:.1f} s old, and max_frame_age is {max_age:g} s; check that the "
                "camera still publishes."
            )
        return replace(frame_of(message), received=received)

    def ages(self) -> dict[str, float]:
        """Return the seconds since the newest frame of each topic, by full name; before the first, since activate."""
        now = time.monotonic()
        return {self._node.resolve_topic_name(topic): now - received for topic, received in self._received.items()}

    def close(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)

    def _keep(self, topic: str, message: Any) -> None:
        self._newest[topic], self._received[topic] = message, time.monotonic()
        self._when_frame(topic, message)
