"""A stand-in of the hub, an empty cache, and the files of a repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.fake_hub import FakeHub, fake_hub
from support.hub_cache import NOT_OF_THE_BUNDLE
from support.hub_client import use_hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        use_hub(monkeypatch, hub, cache)
        yield hub


@pytest.fixture
def files(tiny_bundle: Path) -> dict[str, bytes]:
    """The files of a repository with a bundle and some others."""
    return {file.name: file.read_bytes() for file in tiny_bundle.iterdir()} | NOT_OF_THE_BUNDLE
