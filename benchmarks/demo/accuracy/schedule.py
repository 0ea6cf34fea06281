"""Run the steps of a measurement in processes of their own, and say how long the rest takes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import cast

from fusion_edge.benchmarks.demo.accuracy.bundles import HELD_OUT, export
from fusion_edge.benchmarks.demo.accuracy.held_out import FILE, write_pictures
from fusion_edge.benchmarks.demo.accuracy.measure import measure
from fusion_edge.benchmarks.demo.accuracy.tables import BUNDLES, FLOAT, Measurement
from fusion_edge.benchmarks.demo.accuracy.work import Work
from fusion_edge.benchmarks.demo.samples import SAMPLES, write_samples
from fusion_edge.runtime.errors import FusionError

CALIBRATION_EFFORT = 500, 20  # questions that take as long: of any calibration, and of each sample
EXPORT_EFFORT = 50


ALONE = 1
"""Number of processes for which steps run in the present one."""


@dataclass(frozen=True)
class Step:
    """Something to do. The steps of a stage need no other of it."""

    label: str
    run: Callable[[], object]
    effort: float
    """In questions that take as long."""


def stages(measurements: Iterable[Measurement], work: Work) -> list[list[Step]]:
    """Return what is left to do. Each stage needs those before it. Each export is a stage: it uses all processors."""
    wanted = dict.fromkeys([FLOAT, *measurements])
    names = dict.fromkeys(one.model for one in wanted if one.model in BUNDLES)
    names = dict.fromkeys(BUNDLES[name].same_size_as or name for name in names) | names
    missing = [name for name in names if not work.bundle(name).exists()]
    left = [one for one in wanted if not work.measurement(one).exists()]
    return [
        list(_data(work)),
        *([_export(name, work)] for name in sorted(missing, key=lambda name: BUNDLES[name].same_size_as is not None)),
        [_measure(one, work) for one in left if one == FLOAT],
        [_measure(one, work) for one in left if one != FLOAT],
    ]


def run(plan: Sequence[Sequence[Step]], processes: int) -> None:
    """Run all stages, and name each finished step on standard error."""
    steps, started = [step for stage in plan for step in stage], time.monotonic()
    done, total = 0.0, sum(step.effort for step in steps)
    for number, step in enumerate(_finished(plan, processes), 1):
        done += step.effort
        elapsed = time.monotonic() - started
        left = elapsed * (total - done) / done / 60
        sys.stderr.write(f"{number} of {len(steps)}, {elapsed / 60:.1f} min, about {left:.1f} left: {step.label}\n")


def _finished(plan: Sequence[Sequence[Step]], processes: int) -> Iterator[Step]:
    """Run each step in a process of its own, the longest of a stage first, and yield it when it is finished.

    Raises :class:`FusionError` if a process fails or is killed. The others are ended then. With :data:`ALONE`
    processes, steps run in the present one and raise their own errors.
    """
    if processes == ALONE:
        for step in (step for stage in plan for step in stage):
            step.run()
            yield step
        return
    context = get_context("spawn")
    for stage in plan:
        left = sorted(stage, key=lambda step: -step.effort)
        running: dict[int, tuple[SpawnProcess, Step]] = {}
        try:
            while left or running:
                while left and len(running) < processes:
                    step = left.pop(0)
                    process = context.Process(target=_run, args=(step.run,))
                    process.start()
                    running[process.sentinel] = process, step
                for sentinel in wait(list(running)):
                    process, step = running.pop(cast(int, sentinel))
                    process.join()
                    if process.exitcode != 0:
                        raise FusionError(f"Step {step.label!r} failed (exit code {process.exitcode}); see above.")
                    yield step
        finally:
            for process, _ in running.values():
                process.terminate()
                process.join()


def _run(work: Callable[[], object]) -> None:
    """Run a step. Its error is one line if it is a :class:`FusionError`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    try:
        work()
    except FusionError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def _data(work: Work) -> Iterator[Step]:
    if not (work.pictures / FILE).exists():
        yield Step("held-out pictures", partial(write_pictures, work.pictures, work.count), work.count)
    if not (work.samples / SAMPLES).exists():
        count = work.calibrating + HELD_OUT
        yield Step("calibration samples", partial(write_samples, work.samples, count), count)


def _export(name: str, work: Work) -> Step:
    least, a_sample = CALIBRATION_EFFORT
    effort = least + a_sample * work.calibrating if BUNDLES[name].is_calibrated else EXPORT_EFFORT
    return Step(f"bundle {name}", partial(export, name, work), effort)


def _measure(measurement: Measurement, work: Work) -> Step:
    return Step(measurement.name, partial(measure, measurement, work), work.questions + work.chosen)
