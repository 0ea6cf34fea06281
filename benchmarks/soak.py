"""A robot's day in short: everything a program can do to a model, at random, for a long time.

    python -m fusion_edge.benchmarks.soak --bundle BUNDLE --minutes 60 --json FILE

Two cameras of 30 frames per second submit to an asker, with deadlines, cancels, and exceptions in callbacks. Beside
them clients hold conversations, look at scenes, abandon streams, await answers in an event loop, cancel whatever runs,
clear the image cache and pass unusable frames. The bundle is the demo model's.

Every answer is compared with a table that was computed beforehand; one that was cut short must be its beginning.
Memory, Python's blocks, threads and file descriptors are sampled. A wrong answer, an unexpected error or growth is an
error (exit code 1). Buffers from 1 MiB are mapped (``mallopt``), so the memory is what is in use: by default the C
library keeps freed frames in the arenas of a dozen threads, 0.5 GB after some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import logging
import os
import random
import statistics
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.latency.machine.memory import resident
from fusion_edge.benchmarks.latency.machine.procfs import BackgroundSampler
from fusion_edge.benchmarks.simulated_cameras import (
    CHOICES,
    CHOOSING,
    QUESTIONS,
    SAMPLING,
    Camera,
    Frame,
    Script,
    write_script,
)
from fusion_edge.runtime import Answer, Asker, Choice, Fusion, FusionError, Request, SceneEvicted, Stopped, load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer, positive_seconds
from fusion_edge.runtime.system.output_file import write_whole

CAMERAS = ("front", "rear")
CAMERA_RATE = 30.0
FRAMES = 8
SAMPLE_SECONDS = 5.0
FEWEST_SAMPLES = 60
"""Five minutes. A shorter soak is not judged by its growth: it is still filling caches and memory arenas."""
WARM_UP = 0.2
"""Part of the time that does not count for growth: caches and memory arenas fill."""
GROWTH = {"resident_bytes": 48 << 20, "blocks": 20_000, "threads": 2, "descriptors": 2}
"""Limits of the difference between the medians of the last and the first fifth after the warm-up. In an hour, 250 bytes
or one block (an object) a frame are more."""
M_MMAP_THRESHOLD = -3
ENDED = "another question was asked"
"""Part of the error of a stream that another question has ended."""


class Robot:
    """The clients of one model, and what they saw."""

    def __init__(self, fusion: Fusion, script: Script, seed: int) -> None:
        self.fusion, self.script, self.seed = fusion, script, seed
        self.asker = Asker(fusion, skip_unchanged=True)
        self.over = threading.Event()
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        first, second = QUESTIONS[:2]
        self.turns = [self._second_turn(number, first, second) for number in range(len(script.frames))]
        self._cancel_later: list[Request[Answer]] = []

    def _second_turn(self, number: int, first: str, second: str) -> tuple[int, ...]:
        conversation = self.fusion.conversation(self.script.frames[number])
        conversation.answer(first, sampling=SAMPLING)
        return conversation.answer(second, sampling=SAMPLING).token_ids

    def problem(self, message: str) -> None:
        """Record what must not happen."""
        self.problems.append(message)
        self.over.set()

    def check(self, kind: str, answer: Answer, expected: Sequence[int]) -> None:
        """Compare an answer with the table."""
        self.seen[f"{kind}: {answer.finish_reason}"] += 1
        reached = tuple(expected) if answer.is_complete else tuple(expected[: len(answer.token_ids)])
        if answer.token_ids != reached:
            self.problem(f"{kind}: {answer.token_ids} ({answer.finish_reason}), expected {tuple(expected)}")

    def guarded(self, kind: str, work: Callable[[], object]) -> None:
        """Do some work of a client, whose errors may only be those that it can cause."""
        try:
            work()
        except (Stopped, ConsumerError) as error:
            self.seen[f"{kind}: {type(error).__name__}"] += 1
        except Exception:
            self.problem(f"{kind}: {traceback.format_exc()}")

    # Clients. Each call is one thing that a program does.

    def camera_frame(self, name: str, draw: random.Random, number: int, frame: Frame) -> None:
        """Submit a frame; some requests have a deadline, a cancel, or consumers that fail."""
        if draw.random() < 0.1:
            choice = self.asker.submit_choose(frame, CHOOSING, CHOICES, key=name, deadline=2.0)
            choice.add_done_callback(partial(self._camera_choice, self.script.choices[number]))
            return
        question = draw.choice(QUESTIONS)
        request = self.asker.submit(
            frame,
            question,
            key=name,
            priority=draw.choice((0, 0, 1)),
            deadline=draw.choice((None, None, None, 0.02, 0.3, 2.0)),
            on_stage=_fail if draw.random() < 0.02 else None,
            sampling=SAMPLING,
        )
        if draw.random() < 0.1:
            request.add_done_callback(_fail)
        request.add_done_callback(partial(self._camera_answer, self.script.answers[number, question]))
        if draw.random() < 0.1:
            self._cancel_later.append(request)

    def _camera_answer(self, expected: tuple[int, ...], request: Request[Answer]) -> None:
        self.guarded("camera", lambda: self.check("camera", request.result(), expected))

    def _camera_choice(self, expected: str, request: Request[Choice]) -> None:
        self.guarded("camera choice", lambda: self.check_choice(request.result(), expected))

    def check_choice(self, choice: Choice, expected: str) -> None:
        """Compare a choice with the table."""
        self.seen["choice"] += 1
        if choice.text != expected:
            self.problem(f"choice: {choice}, expected {expected}")

    def cancel(self, draw: random.Random) -> None:
        """Cancel an old request, or whatever runs."""
        while self._cancel_later:
            self._cancel_later.pop().cancel()
        if draw.random() < 0.3:
            self.fusion.cancel()

    def answer(self, draw: random.Random) -> None:
        """Ask without the asker."""
        number, question = draw.randrange(len(self.script.frames)), draw.choice(QUESTIONS)
        deadline = draw.choice((None, 0.05, 1.0))
        answer = self.fusion.answer(self.script.frames[number], question, sampling=SAMPLING, deadline=deadline)
        self.check("answer", answer, self.script.answers[number, question])
        self.check_choice(
            self.fusion.choose(self.script.frames[number], CHOOSING, CHOICES), self.script.choices[number]
        )

    def stream(self, draw: random.Random) -> None:
        """Take some pieces of a stream, and abandon it or cancel it."""
        number, question = draw.randrange(len(self.script.frames)), draw.choice(QUESTIONS)
        stream = self.fusion.stream(self.script.frames[number], question, sampling=SAMPLING)
        try:
            for _ in range(draw.randrange(4)):
                if next(stream, None) is None:
                    self.check("stream", stream.answer, self.script.answers[number, question])
                    return
            if draw.random() < 0.5:
                self.seen["stream: abandoned"] += 1
                return
            stream.cancel()
            for _ in stream:
                pass
            self.check("stream", stream.answer, self.script.answers[number, question])
        except FusionError as error:
            if ENDED not in str(error):
                raise
            self.seen["stream: ended"] += 1

    def converse(self, draw: random.Random) -> None:
        """Ask two questions in a conversation."""
        number = draw.randrange(len(self.script.frames))
        conversation = self.fusion.conversation(self.script.frames[number])
        first, second = QUESTIONS[:2]
        answer = conversation.answer(first, sampling=SAMPLING)
        self.check("conversation", answer, self.script.answers[number, first])
        if answer.is_complete:
            self.check("conversation", conversation.answer(second, sampling=SAMPLING), self.turns[number])

    def look(self, draw: random.Random) -> None:
        """Ask about a scene, here and through the asker. Later pictures may evict it."""
        number, question = draw.randrange(len(self.script.frames)), draw.choice(QUESTIONS)
        expected = self.script.answers[number, question]
        try:
            with self.fusion.look(self.script.frames[number], guide=question) as scene:
                self.check("scene", scene.answer(question, sampling=SAMPLING), expected)
                request = self.asker.submit(scene, question, priority=1, sampling=SAMPLING)
                self.check("scene", request.result(), expected)
                if question == CHOOSING:
                    self.check_choice(scene.choose(question, CHOICES), self.script.choices[number])
        except SceneEvicted:
            self.seen["scene: SceneEvicted"] += 1

    def ask_in_a_loop(self, draw: random.Random) -> None:
        """Await answers in an event loop, and cancel some of the tasks."""
        asyncio.run(self._ask_in_a_loop(draw))

    async def _ask_in_a_loop(self, draw: random.Random) -> None:
        cases = [(draw.randrange(len(self.script.frames)), draw.choice(QUESTIONS)) for _ in range(3)]
        tasks = [
            asyncio.create_task(self.asker.ask(self.script.frames[number], question, sampling=SAMPLING))
            for number, question in cases
        ]
        await asyncio.sleep(draw.random())
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for case, result in zip(cases, results, strict=True):
            if isinstance(result, Answer):
                self.check("asyncio", result, self.script.answers[case])
            elif isinstance(result, (Stopped, asyncio.CancelledError)):
                self.seen[f"asyncio: {type(result).__name__}"] += 1
            else:
                raise result

    def misuse(self, draw: random.Random) -> None:
        """Pass what is refused, and make askers that are closed or forgotten."""
        wrong: Any = draw.choice((np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), "missing.png", 3))
        try:
            self.asker.submit(wrong, "What?", priority=2).result()
        except Stopped:
            raise
        except FusionError:
            self.seen["misuse: refused"] += 1
        asker = Asker(self.fusion)
        request = asker.submit(self.script.frames[0], QUESTIONS[0], sampling=SAMPLING)
        if draw.random() < 0.5:
            asker.close()
        del asker
        self.check("forgotten asker", request.result(), self.script.answers[0, QUESTIONS[0]])

    def maintain(self, draw: random.Random) -> None:
        """Use the image cache."""
        if draw.random() < 0.5:
            self.fusion.clear_image_cache()
        else:
            self.fusion.encode_image(draw.choice(self.script.frames))
        self.seen["maintenance"] += 1

    def run(self, minutes: float) -> None:
        """Run all clients."""
        clients = {
            self.cancel: 0.5,
            self.answer: 1.0,
            self.stream: 1.0,
            self.converse: 2.0,
            self.look: 2.0,
            self.ask_in_a_loop: 2.0,
            self.misuse: 3.0,
            self.maintain: 3.0,
        }
        with ExitStack() as stack:
            stack.enter_context(self.asker)
            for position, name in enumerate(CAMERAS):
                draw, first = random.Random(f"{self.seed} {name}"), position * FRAMES // len(CAMERAS)
                frame = partial(self.camera_frame, name, draw)
                stack.enter_context(Camera(self.script.frames, CAMERA_RATE, first, frame))
            threads = [threading.Thread(target=self._client, args=client) for client in clients.items()]
            for thread in threads:
                thread.start()
            self.over.wait(60 * minutes)
            self.over.set()
            for thread in threads:
                thread.join()

    def _client(self, act: Callable[[random.Random], None], pause: float) -> None:
        """Do one thing again and again, with pauses of ``pause`` seconds on average."""
        draw = random.Random(f"{self.seed} {act.__name__}")
        while not self.over.wait(draw.expovariate(1 / pause)):
            self.guarded(act.__name__, partial(act, draw))


class ConsumerError(Exception):
    """An error in a consumer's code."""


def _fail(_: object) -> None:
    raise ConsumerError


class Monitor(BackgroundSampler):
    """Samples memory, threads and file descriptors."""

    def __init__(self) -> None:
        super().__init__(SAMPLE_SECONDS)
        self.samples: list[dict[str, float]] = []

    def sample(self, seconds: float) -> None:
        self.samples.append(
            {
                "seconds": round(seconds, 1),
                "resident_bytes": resident(),
                "blocks": sys.getallocatedblocks(),
                "threads": threading.active_count(),
                "descriptors": len(os.listdir("/proc/self/fd")),
            }
        )

    def growth(self) -> dict[str, float]:
        """Return the differences between the medians of the last and the first fifth after the warm-up."""
        counted = self.samples[int(WARM_UP * len(self.samples)) :]
        fifth = max(1, len(counted) // 5)
        return {
            name: statistics.median(sample[name] for sample in counted[-fifth:])
            - statistics.median(sample[name] for sample in counted[:fifth])
            for name in GROWTH
        }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle of the demo model")
    add("--minutes", type=positive_seconds, default=60.0, help="duration (default: %(default)g)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--threads", type=positive_integer, help="threads of ONNX Runtime (default: every processor)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20) != 1:
        raise FusionError("The C library has no mallopt; run the soak on Linux with glibc.")
    logging.getLogger("fusion_edge").addFilter(lambda record: not _is_expected(record))
    with load(options.bundle, device="cpu", threads=options.threads, cached_images=3) as fusion:
        robot, monitor = Robot(fusion, write_script(fusion, FRAMES), options.seed), Monitor()
        threading.excepthook = lambda raised: robot.problem(repr(raised.exc_value))
        with monitor:
            robot.run(options.minutes)
        latencies = robot.asker.latencies()
    growth = monitor.growth()
    is_long = len(monitor.samples) >= FEWEST_SAMPLES
    for name, limit in GROWTH.items():
        if is_long and growth[name] > limit:
            robot.problems.append(f"{name} grew by {growth[name]:.0f}, more than {limit}")
    remark = "" if is_long else " (too short to judge)"
    sys.stdout.write(f"{latencies}\n{dict(sorted(robot.seen.items()))}\ngrowth: {growth}{remark}\n")
    if options.json:
        result = {
            "command": ["python", "-m", "fusion_edge.benchmarks.soak", *sys.argv[1:]],
            "minutes": monitor.samples[-1]["seconds"] / 60,
            "problems": robot.problems,
            "seen": dict(sorted(robot.seen.items())),
            "growth": growth,
            "latencies": asdict(latencies),
            "samples": monitor.samples,
            "machine": asdict(machine_info(None)),
        }
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    if robot.problems:
        raise FusionError(f"{len(robot.problems)} problems; the first: {robot.problems[0]}")
    return 0


def _is_expected(record: logging.LogRecord) -> bool:
    """Whether the log entry is of an error that the soak's own callbacks raise."""
    return record.exc_info is not None and record.exc_info[0] is ConsumerError


if __name__ == "__main__":
    sys.exit(main())
