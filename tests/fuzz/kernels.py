"""Random calls of our CPU kernels on memory between pages that nobody may touch.

    PYTHONPATH=tests .venv/bin/python -m fuzz.kernels FIRST COUNT

Each call has a number, which draws it: ``run(number, 1)`` is the same call again. Calls run in processes of their own,
so one that stops its process is reported as others are.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fuzz.fake_onnxruntime import Call, FakeOnnxRuntime, Refused
from fuzz.guarded_memory import GuardedMemory
from fuzz.kernel_calls import draw
from fuzz.kernel_cases import Case


def run(seed: int, count: int) -> list[str]:
    """What failed of the calls ``seed``, ``seed + 1`` ..., ``count`` of them."""
    library = cpu_kernels.library()
    assert library is not None, "the kernels are not built"
    failures: list[str] = []
    number, end = seed, seed + count
    while number < end:
        number = _run_in_a_process(library, number, end, failures)
    return failures


def _run_in_a_process(library: Path, first: int, end: int, failures: list[str]) -> int:
    """The number of the call after the last one that was run."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_all, args=(library, first, end, sender))
    child.start()
    sender.close()
    number = first
    try:
        while True:
            number, failure = receiver.recv()
            if failure:
                failures.append(f"call {number}: {failure}")
    except EOFError:
        child.join()
    if child.exitcode:
        reason = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit code {child.exitcode}"
        failures.append(f"call {number}: {reason} in {draw(np.random.default_rng(number)).operator}")
    return number + 1


def _run_all(library: Path, first: int, end: int, sender: Connection) -> None:
    sys.unraisablehook = lambda _: os._exit(70)  # of a function that the kernels call
    runtime = FakeOnnxRuntime(library)
    for number in range(first, end):
        sender.send((number, None))  # before it stops this process
        random = np.random.default_rng(number)
        if failure := _failure(runtime, draw(random), random):
            sender.send((number, failure))


def _failure(runtime: FakeOnnxRuntime, case: Case, random: np.random.Generator) -> str | None:
    runtime.kernels.use_bfloat16(case.bfloat16)
    runtime.kernels.use_streams(bool(random.integers(2)))
    with GuardedMemory() as memory:
        at_end, off = bool(random.random() < 0.8), int(random.choice([0, 0, 0, 1, 3]))
        shared = set(case.in_place.values())
        inputs = [
            None if array is None else memory.copy(array, at_end, 0 if place in shared else off)
            for place, array in enumerate(case.inputs)
        ]
        for place, array in enumerate(inputs):
            if array is not None and place not in shared:
                memory.make_read_only(array)
        threads = int(random.choice([1, 1, 1, 2, 5]))
        call = Call(case.attributes, inputs, memory, at_end, threads, bool(random.integers(2)), case.in_place)
        try:
            outputs = runtime.run(*case.operator, call)
        except Refused as refused:
            said = str(refused)
            if case.check is not None:
                return f"{case.operator} was refused: {said}"
            name = re.escape(case.operator[1])
            return None if re.fullmatch(rf"{name}: [^\n]+\.", said) else f"{case.operator} says {said!r}"
        if case.check is None:
            return f"{case.operator} was not refused"
        wrong = case.check(outputs)
        return f"{case.operator}: {wrong}" if wrong else None


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    failures = run(first, count)
    print("\n".join([*failures, f"{count} calls, {len(failures)} failures"]))
    sys.exit(bool(failures))
