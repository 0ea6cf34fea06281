"""The program ``fusion_edge_node``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from fusion_edge import FusionError
from fusion_edge_ros.node import FusionEdgeNode

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_RESULTS = 1.0
"""Seconds in which goals get their results after a signal."""


def main() -> int:
    """Run the node until a signal; return the exit code."""
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = FusionEdgeNode()
    except (FusionError, ParameterException) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    stopped: Future[None] = Future()
    _stop_at_a_signal(stopped)
    try:
        if node.settings.autostart and not _start(node):
            return 1
        executor.spin_until_future_complete(stopped)
        _finish(node, executor)
    finally:
        node.destroy_node()
        rclpy.shutdown()
    return 0


def _start(node: FusionEdgeNode) -> bool:
    """Configure and activate the node; return whether both succeed."""
    steps = (node.trigger_configure, node.trigger_activate)
    return all(step() == TransitionCallbackReturn.SUCCESS for step in steps)


def _finish(node: FusionEdgeNode, executor: SingleThreadedExecutor) -> None:
    """Shut the node down, and send results of goals that end by it."""
    if node.state != "finalized":
        node.trigger_shutdown()
    end = time.monotonic() + LAST_RESULTS
    while node.has_goals and time.monotonic() < end:
        executor.spin_once(timeout_sec=0.1)


def _stop_at_a_signal(stopped: Future[None]) -> None:
    """Have the first signal end the program in order, and the second at once.

    Python would call a handler only after the executor's wait. So signals write to a pipe, which a thread reads.
    """
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)

    def read() -> None:
        os.read(ours, 1)
        stopped.set_result(None)
        os._exit(128 + os.read(ours, 1)[0])

    threading.Thread(target=read, daemon=True).start()
