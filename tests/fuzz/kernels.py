"""Fuzz the CPU kernels: random calls on memory between guard pages.

    PYTHONPATH=tests .venv/bin/python -m fuzz.kernels FIRST COUNT TIER

The number of a call seeds it: ``run(number, 1)`` repeats it. Calls run in a child process, so a crash is reported like
any other failure.
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
from fuzz.fake_onnxruntime import Call, FakeOnnxRuntime, KernelError
from fuzz.guarded_memory import GuardedMemory
from fuzz.kernel_calls import draw
from fuzz.kernel_cases import Array, Case


def run(seed: int, count: int, tier: str) -> list[str]:
    """Run the calls ``seed`` to ``seed + count - 1`` on a tier and return a message for each failure."""
    library = cpu_kernels.library()
    assert library is not None, "the kernels are not built"
    failures: list[str] = []
    number, end = seed, seed + count
    while number < end:
        number = _run_in_child(library, tier, number, end, failures)
    return failures


def _run_in_child(library: Path, tier: str, first: int, end: int, failures: list[str]) -> int:
    """Run calls until one crashes; return the number of the next call."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_all, args=(library, tier, first, end, sender))
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
        failures.append(f"call {number}: {reason} in {draw(np.random.default_rng(number)).operator.name}")
    return number + 1


def _run_all(library: Path, tier: str, first: int, end: int, sender: Connection) -> None:
    sys.unraisablehook = lambda _: os._exit(70)  # an exception in a callback of the fake
    runtime = FakeOnnxRuntime(library)
    runtime.kernels.use_tier(tier.encode())
    for number in range(first, end):
        sender.send((number, None))  # before a crash
        random = np.random.default_rng(number)
        if failure := _failure(runtime, tier, draw(random), random):
            sender.send((number, failure))


def _failure(runtime: FakeOnnxRuntime, tier: str, case: Case, random: np.random.Generator) -> str | None:
    runtime.kernels.use_bfloat16(case.bfloat16)
    runtime.kernels.use_streams(bool(random.integers(2)))
    with GuardedMemory() as memory:
        at_end, off = bool(random.random() < 0.8), int(random.choice([0, 0, 0, 1, 3]))
        operator, shared = case.operator, set(case.in_place.values())
        inputs: list[Array | None] = []
        for name in operator.inputs:
            array = case.inputs.get(name)
            inputs.append(None if array is None else memory.copy(array, at_end, 0 if name in shared else off))
            if inputs[-1] is not None and name not in shared:
                memory.make_read_only(inputs[-1])
        threads = int(random.choice([1, 1, 1, 2, 5]))
        in_place = {
            list(operator.outputs).index(output): operator.positions(name)[0] for output, name in case.in_place.items()
        }
        call = Call(case.attributes, inputs, memory, at_end, threads, bool(random.integers(2)), in_place)
        name = f"{operator.domain}::{operator.name}"
        try:
            outputs = runtime.run(operator, call)
        except KernelError as error:
            message = str(error)
            if case.check is not None:
                return f"{name} fails on a valid call: {message}"
            is_sentence = re.fullmatch(rf"{re.escape(operator.name)}: [^\n]+\.", message)
            return None if is_sentence else f"{name} reports {message!r}"
        if case.check is None:
            return f"{name} accepts an invalid call"
        difference = case.check(outputs, tier)
        return f"{name}: {difference}" if difference else None


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:3])
    failures = run(first, count, sys.argv[3])
    print("\n".join([*failures, f"{count} calls, {len(failures)} failures"]))
    sys.exit(bool(failures))
