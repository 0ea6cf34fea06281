"""A model without ROS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.watched_backend import watched_fusion

from fusion_edge.runtime import Fusion


@pytest.fixture
def watched(tiny_bundle: Path) -> Iterator[Fusion]:
    """A model whose backend fails on concurrent calls, and can be blocked."""
    with watched_fusion(tiny_bundle) as fusion:
        yield fusion
