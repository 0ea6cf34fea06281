"""The machine of these tests has no GPU but the fake ones."""

from __future__ import annotations

import pytest

from fusion_edge.benchmarks.acceptance import device


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a GPU of the machine that runs the tests."""
    monkeypatch.setattr(device, "this_jetson", lambda: None)
    monkeypatch.setattr(device, "find_gpu", lambda: None)
