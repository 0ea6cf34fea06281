"""Tests of our CPU kernels need them, and a processor that runs them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

needs_cpu_kernels = pytest.mark.skipif(
    cpu_kernels.library() is None or not cpu_kernels.is_supported(),
    reason="our CPU kernels: not built, or this processor has no AVX-512 VNNI",
)


@contextmanager
def streams(wanted: bool) -> Iterator[None]:
    """Products of one row that read weights in several streams, or in one; the processor decides otherwise."""
    kernels = ctypes.CDLL(str(cpu_kernels.library()))
    before = kernels.use_streams(wanted)
    try:
        yield
    finally:
        kernels.use_streams(before)


@contextmanager
def exact_attention() -> Iterator[None]:
    """Attention in float32, where ours would round its factors to bfloat16."""
    path = cpu_kernels.library()
    kernels = None if path is None else ctypes.CDLL(str(path))
    if kernels is not None:
        kernels.use_bfloat16(False)
    try:
        yield
    finally:
        if kernels is not None:
            kernels.use_bfloat16(True)
