"""Tests of our CPU kernels need them, and a processor that runs them."""

from __future__ import annotations

import pytest

from fusion_edge.runtime.backends import cpu_kernels

needs_cpu_kernels = pytest.mark.skipif(
    cpu_kernels.library() is None or not cpu_kernels.is_supported(),
    reason="our CPU kernels: not built, or this processor has no AVX-512 VNNI",
)
