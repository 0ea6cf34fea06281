"""Measure the node beside the same model in this process: latency, frames, processors.

    .ci/ros2 kilted python tests/ros2/measure.py --bundle BUNDLE --json FILE

A camera publishes 1280 x 720 at 30 Hz from this process, which also asks. The bundle is the demo model's. Frames go
through Fast DDS as ``FASTDDS_DEFAULT_PROFILES_FILE`` and ``FASTDDS_BUILTIN_TRANSPORTS`` in the environment say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import rclpy
from fusion_edge_msgs.action import Ask
from rclpy.action import ActionClient
from ros2.node.robot import NODE, Robot, image, node_process, stop

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.simulated_cameras import QUESTIONS, SAMPLING, SIZE, Frame, frames
from fusion_edge.runtime import load
from fusion_edge.runtime.system.output_file import write_whole

RATE = 30
COLOR = QUESTIONS[1]
RELIABILITY = "qos_overrides./image.subscription.reliability"
TICKS = os.sysconf("SC_CLK_TCK")


def summary(seconds: list[float]) -> dict[str, float]:
    """Return minimum and percentiles in milliseconds."""
    ordered = sorted(seconds)
    return {
        "min_ms": 1000 * ordered[0],
        "p50_ms": 1000 * statistics.median(ordered),
        "p95_ms": 1000 * ordered[len(ordered) * 95 // 100],
    }


@contextmanager
def active_node(robot: Robot, **parameters: object) -> Iterator[subprocess.Popen[str]]:
    """Run the node, from when it receives frames, and shut it down, so that no subscription of it is left."""
    with tempfile.TemporaryDirectory() as folder, node_process(Path(folder), **parameters) as process:
        robot.until(lambda: robot.diagnosis()["state"] == "active")
        robot.wait_for_subscriber()
        yield process
        assert stop(process) == 0


def latencies(robot: Robot, bundle: Path, shown: tuple[Frame, ...], count: int, threads: int) -> dict[str, Any]:
    """Time each question three ways in turn, so that other load on the machine meets all of them.

    ``fusion_answer``: in this process. ``question``: by topic, about a frame of the node. ``goal``: by the action,
    with the frame in the goal.
    """
    client = ActionClient(robot.node, Ask, f"{NODE}/ask")
    robot.until(client.server_is_ready)
    options = {"question": COLOR, "max_new_tokens": SAMPLING.max_new_tokens}

    def goal(frame: Frame) -> None:
        handle = robot.wait(client.send_goal_async(Ask.Goal(image=image(frame, 1), **options)))
        assert robot.wait(handle.get_result_async()).result.error == ""

    seconds: dict[str, list[float]] = {"fusion_answer": [], "question": [], "goal": []}
    with load(bundle, device="cpu", threads=threads) as fusion:
        for number in range(count):
            frame, other = shown[number % len(shown)], shown[(number + 1) % len(shown)]
            robot.show_until_seen(other, number)
            goal(frame)  # then the node has another picture cached than the question is about
            seconds["fusion_answer"].append(timed(partial(fusion.answer, frame, COLOR, sampling=SAMPLING)))
            seconds["question"].append(timed(partial(robot.ask, **options)))
            seconds["goal"].append(timed(partial(goal, frame)))
    return {name: summary(values) for name, values in seconds.items()}


def camera(robot: Robot, process: subprocess.Popen[str], shown: tuple[Frame, ...], seconds: float) -> dict[str, Any]:
    """Publish frames; return how many the node received and answered, ages of answers, and its share of a processor."""
    before, start = processor_seconds(process.pid), time.monotonic()
    robot.answers.clear()
    first = robot.diagnosis()
    count = round(RATE * seconds)
    for number in range(count):
        robot.show(shown[number % len(shown)], number)
        robot.spin(start + (number + 1) / RATE - time.monotonic())
    elapsed = time.monotonic() - start
    share = (processor_seconds(process.pid) - before) / elapsed
    last = robot.diagnosis()
    ages = [answer["age"] for answer in robot.answers]
    return {
        "published": count,
        "seconds": elapsed,
        "received": int(last["frames"]) - int(first["frames"]),
        "answered": len(ages),
        "processors": share,
        "age": summary(ages) if ages else None,
    }


def timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    shown = frames(8)
    command = ["python", "tests/ros2/measure.py", *sys.argv[1:]]
    settings = {
        "size": SIZE,
        "rate": RATE,
        "threads": arguments.threads,
        "answers": arguments.answers,
        "fast_dds": {name: value for name, value in os.environ.items() if name.startswith("FASTDDS_")},
    }
    machine = asdict(machine_info(None))
    figures: dict[str, Any] = {}
    rclpy.init()
    robot = Robot()
    parameters = {"bundle": str(arguments.bundle), "threads": arguments.threads, "autostart": True}
    with active_node(robot, **parameters):
        figures |= latencies(robot, arguments.bundle, shown, arguments.answers, arguments.threads)
    for asked, reliability in itertools.product((False, True), ("best_effort", "reliable")):
        question = {"question": COLOR, "max_new_tokens": SAMPLING.max_new_tokens} if asked else {}
        with active_node(robot, **parameters, **question, **{RELIABILITY: reliability}) as process:
            figure = camera(robot, process, shown, arguments.seconds)
        name = f"camera_{'asked' if asked else 'unasked'}_{reliability}"
        figures[name] = figure | {"load_average": os.getloadavg()[0]}
    robot.close()
    rclpy.shutdown()
    whole = {"command": command, "settings": settings, "results": figures, "machine": machine}
    write_whole(arguments.json, json.dumps(whole, indent=2) + "\n")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
