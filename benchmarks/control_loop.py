"""Measure how punctual a control loop is beside two cameras whose every newest frame is asked about.

    python -m fusion_edge.benchmarks.control_loop --bundle BUNDLE --seconds 60 --json FILE

The bundle is the demo model's. Three settings alternate, so that other load on the machine meets all of them:

- ``idle``: the cameras run, and nothing is asked.
- ``asker``: an ``Asker`` in the same process answers about the cameras' frames.
- ``process``: cameras and asker run in a second process; the control loop is alone in its own.

A tick is missed if its work is done later than 5 ms after its time. The kernel reports how long the loop's thread was
runnable without a processor; the rest of a delay is the process's own, such as waiting for Python's lock. Every answer
is compared with that of its frame.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.simulated_cameras import QUESTIONS, SAMPLING, SIZE, Camera, Frame, Script, write_script
from fusion_edge.runtime import Answer, Asker, Cancelled, Fusion, Request, Superseded, load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer, positive_seconds
from fusion_edge.runtime.system.output_file import write_whole

SETTINGS = ("idle", "asker", "process")
CAMERAS = ("front", "rear")
CAMERA_RATE = 30.0
FRAMES = 8
LATE = 0.005
"""Seconds after which a tick is missed."""


@dataclass
class Ticks:
    """The delays of a control loop's ticks in seconds."""

    delays: list[float] = field(default_factory=list)
    """From a tick's time to the end of its work."""
    queued: list[float] = field(default_factory=list)
    """Part of each delay in which the kernel gave the thread no processor."""

    def summary(self) -> dict[str, float]:
        """Return the number of ticks, of missed ones, of those missed by the process itself, and percentiles."""
        own = [delay - queued for delay, queued in zip(self.delays, self.queued, strict=True)]
        ordered = sorted(self.delays)
        return {
            "ticks": len(ordered),
            "missed": sum(delay > LATE for delay in ordered),
            "missed_by_the_process": sum(delay > LATE for delay in own),
            "p50_ms": 1000 * ordered[len(ordered) // 2],
            "p99_ms": 1000 * ordered[len(ordered) * 99 // 100],
            "max_ms": 1000 * ordered[-1],
            "max_by_the_process_ms": 1000 * max(own),
        }


@dataclass
class Answers:
    """What was answered, compared with the script."""

    right: int = 0
    wrong: int = 0
    failed: int = 0

    def check(self, expected: tuple[int, ...], request: Request[Answer]) -> None:
        """Count a request that has ended."""
        try:
            is_right = request.result().token_ids == expected
        except (Superseded, Cancelled):  # by a newer frame, at the end
            return
        except Exception as error:
            sys.stderr.write(f"{error}\n")
            self.failed += 1
            return
        self.right += is_right
        self.wrong += not is_right


@contextmanager
def cameras(script: Script, asker: Asker | None, answers: Answers) -> Iterator[None]:
    """Run both cameras; each asks its own question about every frame."""

    def ask(name: str, question: str, number: int, frame: Frame) -> None:
        if asker is not None:
            request = asker.submit(frame, question, key=name, sampling=SAMPLING)
            request.add_done_callback(partial(answers.check, script.answers[number, question]))

    with ExitStack() as stack:
        for position, (name, question) in enumerate(zip(CAMERAS, QUESTIONS, strict=False)):
            first = position * FRAMES // len(CAMERAS)
            stack.enter_context(Camera(script.frames, CAMERA_RATE, first, partial(ask, name, question)))
        yield


def control(rate: float, seconds: float) -> Ticks:
    """Run a control loop; return the delays of its ticks."""
    ticks = Ticks()
    start = time.monotonic()
    with open("/proc/thread-self/schedstat", encoding="ascii") as schedstat:
        for tick in range(1, int(rate * seconds) + 1):
            due = start + tick / rate
            before = _queued(schedstat.fileno())
            time.sleep(max(0.0, due - time.monotonic()))
            sum(number * number for number in range(500))  # 20 us of steering
            ticks.delays.append(time.monotonic() - due)
            ticks.queued.append(_queued(schedstat.fileno()) - before)
    return ticks


def _queued(schedstat: int) -> float:
    """Return the seconds that this thread has waited for a processor."""
    return int(os.pread(schedstat, 100, 0).split()[1]) / 1e9


def in_this_process(
    fusion: Fusion | None, script: Script, rate: float, seconds: float
) -> tuple[Ticks, dict[str, object]]:
    """Run the control loop beside the cameras, which ask if there is a model."""
    answers = Answers()
    with ExitStack() as stack:
        asker = None if fusion is None else stack.enter_context(Asker(fusion))
        stack.enter_context(cameras(script, asker, answers))
        ticks = control(rate, seconds)
    return ticks, {} if asker is None else {**asdict(answers), "latencies": asdict(asker.latencies())}


def in_a_second_process(
    bundle: Path, threads: int | None, rate: float, seconds: float
) -> tuple[Ticks, dict[str, object]]:
    """Run the control loop alone, and the rest in a process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_ask, args=(theirs, bundle, threads))
    process.start()
    ours.recv()  # it has started
    ticks = control(rate, seconds)
    ours.send(None)
    asked = ours.recv()
    process.join()
    return ticks, asked


def _ask(pipe: Connection, bundle: Path, threads: int | None) -> None:
    """Run the cameras and ask about their frames until a message comes."""
    answers = Answers()
    with load(bundle, device="cpu", threads=threads) as fusion:
        script = write_script(fusion, FRAMES)
        with Asker(fusion) as asker, cameras(script, asker, answers):
            pipe.send(None)
            pipe.recv()
        pipe.send({**asdict(answers), "latencies": asdict(asker.latencies())})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle of the demo model")
    add("--seconds", type=positive_seconds, default=60.0, help="time of each setting (default: %(default)g)")
    add("--rounds", type=positive_integer, default=3, help="parts of each setting's time (default: %(default)s)")
    add("--rate", type=positive_seconds, default=5.0, help="ticks per second (default: %(default)g)")
    add("--threads", type=positive_integer, help="threads of ONNX Runtime (default: every processor)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    ticks = {setting: Ticks() for setting in SETTINGS}
    asked: dict[str, list[dict[str, object]]] = {setting: [] for setting in SETTINGS}
    seconds = options.seconds / options.rounds
    machine = machine_info(None)
    with load(options.bundle, device="cpu", threads=options.threads) as fusion:
        script = write_script(fusion, FRAMES)
        for _ in range(options.rounds):
            for setting in SETTINGS:
                if setting == "process":
                    found, answers = in_a_second_process(options.bundle, options.threads, options.rate, seconds)
                else:
                    model = fusion if setting == "asker" else None
                    found, answers = in_this_process(model, script, options.rate, seconds)
                ticks[setting].delays += found.delays
                ticks[setting].queued += found.queued
                asked[setting].append(answers)
    result = {setting: {**ticks[setting].summary(), "asked": asked[setting]} for setting in SETTINGS}
    for setting in SETTINGS:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in ticks[setting].summary().items())
        sys.stdout.write(
            f"{setting}: {figures}\n" + "".join(f"    {answers}\n" for answers in asked[setting] if answers)
        )
    if options.json:
        command = ["python", "-m", "fusion_edge.benchmarks.control_loop", *sys.argv[1:]]
        settings = {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "rate": options.rate,
            "threads": options.threads,
        }
        workload = {"cameras": len(CAMERAS), "camera_rate": CAMERA_RATE, "size": SIZE}
        whole = {"command": command, "settings": settings | workload, "results": result, "machine": asdict(machine)}
        write_whole(options.json, json.dumps(whole, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
