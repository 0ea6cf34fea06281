"""What the messages of TensorRT's logger say about memory."""

from __future__ import annotations

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, FakeTensorRT

from fusion_edge.runtime.backends.tensorrt.library import Library, Messages

NO_IMPLEMENTATION = "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)"


@pytest.fixture
def messages() -> Messages:
    return Messages(Library(FakeTensorRT(*FULL, FakeCuda())))


@pytest.mark.parametrize(
    "error",
    [
        "CUDA error 2 for 622329856-byte allocation.",
        "NvMapMemAllocInternalTagged: 1075072515 error 12",
        "Error Code 2: OutOfMemory (Requested size was 9 bytes.)",
        "Error Code 1: Cuda Runtime (out of\n memory)",
        "Requested amount of GPU memory (9 bytes) could not be allocated.",
        "std::bad_alloc",
    ],
)
def test_failed_allocations(messages: Messages, error: str) -> None:
    messages.add(error, is_error=True)
    assert messages.out_of_memory
    assert messages.first_error() == " ".join(error.split()).rstrip(".")
    messages.clear()
    assert (messages.out_of_memory, messages.errors) == (False, [])
    messages.add(error, is_error=False)  # the build goes on with another kernel
    messages.add(NO_IMPLEMENTATION, is_error=True)  # perhaps for another reason
    assert not messages.out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        NO_IMPLEMENTATION,
        "CUDA error 209 in a kernel",
        "Could not infer output types for operation: dequantize",
        "Skipping tactic 0x1 due to exception Requested amount of GPU memory (9 bytes) could not be allocated.",
    ],
)
def test_other_errors(messages: Messages, error: str) -> None:
    messages.add(error, is_error=True)
    assert not messages.out_of_memory
