"""A server in a thread, on a model with a backend that tests can block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.watched_backend import watched_fusion
from openai import OpenAI
from support.http_servers import HttpServer, eventually, http_server

from fusion_edge.runtime import Fusion


@pytest.fixture
def server(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    with http_server(lambda: watched_fusion(tiny_bundle), monkeypatch, queue=2) as server:
        eventually(lambda: server.engine.loaded.done())
        yield server


@pytest.fixture(scope="module")
def shared_server(tiny_bundle: Path) -> Iterator[HttpServer]:
    """A server for all tests of a file, which leave it as it is."""
    with pytest.MonkeyPatch.context() as patch, http_server(lambda: watched_fusion(tiny_bundle), patch) as server:
        eventually(lambda: server.engine.loaded.done())
        yield server


@pytest.fixture
def fusion(tiny_bundle: Path) -> Iterator[Fusion]:
    """The same model as the server's, to compare answers with."""
    with watched_fusion(tiny_bundle) as fusion:
        yield fusion


@pytest.fixture
def client(server: HttpServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client
