"""Skip mark for tests that need the CPU kernels, and switches of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

needs_cpu_kernels = pytest.mark.skipif(
    cpu_kernels.library() is None or not cpu_kernels.is_supported(),
    reason=f"the CPU kernels are not compiled, or this is not {cpu_kernels.processor_needed()}",
)


@contextmanager
def tier(name: str) -> Iterator[None]:
    """Make the kernels use a tier. Skip the test if this processor lacks it."""
    if not cpu_kernels.use_tier(name):
        pytest.skip(f"this processor lacks {name}")
    try:
        yield
    finally:
        fastest = cpu_kernels.tier()
        assert fastest is not None
        cpu_kernels.use_tier(fastest)


@contextmanager
def streams(enabled: bool) -> Iterator[None]:
    """Make GEMV read weights in several streams, or in one. The default depends on the processor."""
    kernels = ctypes.CDLL(str(cpu_kernels.library()))
    before = kernels.use_streams(enabled)
    try:
        yield
    finally:
        kernels.use_streams(before)


@contextmanager
def exact_attention() -> Iterator[None]:
    """Make attention compute in float32 instead of bfloat16."""
    path = cpu_kernels.library()
    kernels = None if path is None else ctypes.CDLL(str(path))
    if kernels is not None:
        kernels.use_bfloat16(False)
    try:
        yield
    finally:
        if kernels is not None:
            kernels.use_bfloat16(True)
