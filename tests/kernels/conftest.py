"""Tests of the CPU kernels run on every tier of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cpu_kernel_switches import tier

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels


@pytest.fixture(scope="module", params=cpu_kernels.TIERS)
def each_tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make the kernels use one tier after the other, and return its name."""
    with tier(request.param):
        yield request.param
