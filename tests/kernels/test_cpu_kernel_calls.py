"""Random calls of the CPU kernels between guard pages, and tests of the guard."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from fuzz import kernels
from fuzz.guarded_memory import GuardedMemory, address
from fuzz.kernel_calls import draw
from support.cpu_kernel_switches import needs_cpu_kernels
from support.paths import TESTS

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

READS = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from fuzz.guarded_memory import GuardedMemory, address
array = GuardedMemory().array((3, 5), "f4", at_end=sys.argv[2] == "end")
ctypes.string_at(address(array), array.nbytes)
print("inside", flush=True)
ctypes.string_at(address(array) + (array.nbytes if sys.argv[2] == "end" else -1), 1)
"""


@needs_cpu_kernels
def test_random_calls(each_tier: str) -> None:
    """Valid calls agree with NumPy, invalid ones report a sentence, and none accesses other memory."""
    assert kernels.run(150 * cpu_kernels.TIERS.index(each_tier), 150, each_tier) == []


@pytest.mark.parametrize("side", ["start", "end"])
def test_access_outside_of_an_array_ends_the_process(side: str) -> None:
    command = [sys.executable, "-c", READS, str(TESTS), side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "inside\n"
    assert done.returncode != 0


@pytest.mark.parametrize("off", [0, 1, 3])
@pytest.mark.parametrize("at_end", [True, False])
def test_placement_of_arrays(at_end: bool, off: int) -> None:
    with GuardedMemory() as memory:
        for shape in ((3, 5), (), (0, 4), (70, 70)):
            array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
            copy = memory.copy(array, at_end, off)
            np.testing.assert_array_equal(copy, array)
            assert (address(copy) + (copy.nbytes + off if at_end else -off)) % 4096 == 0
            memory.make_read_only(copy)


def test_a_number_always_draws_the_same_call() -> None:
    for number in range(50):
        one, other = (draw(np.random.default_rng(number)) for _ in range(2))
        assert one.operator == other.operator
        assert one.attributes == other.attributes
        for first, second in zip(one.inputs, other.inputs, strict=True):
            np.testing.assert_array_equal(first, second)
