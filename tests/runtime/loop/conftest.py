"""A model on a backend that tests can block, and an asker that is closed after each test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.watched_backend import watched_fusion
from support.askers import MakeAsker

from fusion_edge.runtime import Asker, Fusion


@pytest.fixture
def fusion(tiny_bundle: Path) -> Iterator[Fusion]:
    with watched_fusion(tiny_bundle) as fusion:
        yield fusion


@pytest.fixture
def make(fusion: Fusion) -> Iterator[MakeAsker]:
    """Makes askers of ``fusion``, and closes them."""
    askers: list[Asker] = []

    def make_asker(**options: Any) -> Asker:
        askers.append(Asker(fusion, **options))
        return askers[-1]

    yield make_asker
    for asker in askers:
        asker.close(timeout=20)


@pytest.fixture
def asker(make: MakeAsker) -> Asker:
    return make()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Every asker's thread ends with its test."""
    yield
    for thread in threading.enumerate():
        if thread.name == "fusion-edge asker":
            thread.join(20)
            assert not thread.is_alive()
