"""Run the steps of a measurement in processes of their own, and say how long the rest takes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from fusion_edge.benchmarks.things.accuracy.bundles import HELD_OUT, export
from fusion_edge.benchmarks.things.accuracy.held_out import FILE, write_pictures
from fusion_edge.benchmarks.things.accuracy.measure import measure
from fusion_edge.benchmarks.things.accuracy.tables import BUNDLES, FLOAT, Measurement
from fusion_edge.benchmarks.things.accuracy.work import Work
from fusion_edge.benchmarks.things.samples import SAMPLES, write_samples

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
    """Return what is left to do. Each stage needs those before it."""
    wanted = dict.fromkeys([FLOAT, *measurements])
    names = dict.fromkeys(one.model for one in wanted if one.model in BUNDLES)
    names = dict.fromkeys(BUNDLES[name].as_large_as or name for name in names) | names
    missing = [name for name in names if not work.bundle(name).exists()]
    left = [one for one in wanted if not work.measurement(one).exists()]
    return [
        list(_data(work)),
        [_export(name, work) for name in missing if BUNDLES[name].as_large_as is None],
        [_export(name, work) for name in missing if BUNDLES[name].as_large_as is not None],
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
    """Run the steps, and yield each as it is finished."""
    if processes == ALONE:
        yield from (_run(step) for stage in plan for step in stage)
        return
    with get_context("spawn").Pool(processes, _ignore_interrupts, maxtasksperchild=1) as pool:
        for stage in plan:
            longest_first = sorted(stage, key=lambda step: -step.effort)
            yield from pool.imap_unordered(_run, longest_first)


def _run(step: Step) -> Step:
    step.run()
    return step


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent, which ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
