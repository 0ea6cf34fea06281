"""Loading, readiness, draining, the end."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes.watched_backend import BlockedCall, backend, watched_fusion
from PIL.Image import Image
from support.http_servers import MODEL, HttpServer, chat, eventually, http_server

from fusion_edge.runtime import Fusion, FusionError
from fusion_edge.runtime.images import encoded
from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.serve.app import make_app
from fusion_edge.runtime.serve.settings import ServeSettings


def test_while_the_model_loads(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_load = threading.Event()

    def load() -> Fusion:
        assert may_load.wait(20)
        return watched_fusion(tiny_bundle)

    with http_server(load, monkeypatch) as server:
        health, ready = server.get("/health"), server.get("/ready")
        assert (health.status, health.json) == (200, {"status": "loading"})
        assert (ready.status, ready.json) == (503, {"status": "loading"})
        refused = server.ask(chat())
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "loading", "1")
        assert server.ask(chat(stop=3)).status == 400  # checks need no model
        assert server.get("/v1/models").json["data"][0]["id"] == MODEL
        assert server.metric("image_cache_queries_total") == 0
        assert server.metric('request_refused_total{reason="loading"}') == 1
        may_load.set()
        eventually(lambda: server.get("/ready").status == 200)
        assert server.ask(chat()).status == 200


def test_a_model_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Fusion:
        raise FusionError("The bundle is damaged.")

    with http_server(load, monkeypatch) as server:
        eventually(lambda: server.server.should_exit)
    assert isinstance(server.server.error, FusionError)


def test_the_health_of_a_failed_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_edge.runtime.serve import server as servers

    async def ignore(_: object) -> None:
        """Go on, as under another ASGI server."""

    def load() -> Fusion:
        raise FusionError("The bundle is damaged.")

    monkeypatch.setattr(servers.Server, "_report", ignore)
    with http_server(load, monkeypatch) as server:
        eventually(lambda: server.engine.state == "failed")
        assert (server.get("/health").status, server.get("/ready").status) == (503, 503)
        refused = server.ask(chat())
        assert (refused.status, refused.error["code"]) == (503, "load_failed")
        assert "damaged" not in refused.error["message"]


def drain(server: HttpServer, seconds: float) -> None:
    asyncio.run_coroutine_threadsafe(server.engine.drain(seconds), server.loop).result(20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_finishes_what_runs_and_waits(server: HttpServer, stream: bool) -> None:
    call = BlockedCall(server.fusion, "encode")
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.ask, chat("What?", seed, stream=stream)) for seed in range(2)]
        assert call.reached.wait(20)
        eventually(lambda: server.engine.waiting() == 1)
        drained = pool.submit(drain, server, 20)
        eventually(lambda: server.engine.state == "draining")
        assert (server.get("/ready").status, server.get("/health").status) == (503, 200)
        refused = server.ask(chat())
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert refused.headers["connection"] == "close"
        assert not drained.done()
        call.release()
        drained.result(20)
    assert [reply.result().status for reply in asked] == [200, 200]
    assert server.metric('request_refused_total{reason="draining"}') == 1


def test_a_drain_cancels_in_the_end(server: HttpServer) -> None:
    server.fusion.backend.before = lambda name: time.sleep(0.01) if name == "decode" else None  # type: ignore[attr-defined]
    with ThreadPoolExecutor(3) as pool:
        whole = pool.submit(server.ask, chat(max_tokens=400))
        eventually(lambda: any(request.first_piece for request in server.engine._live))
        stream = pool.submit(server.ask, chat("What?", 1, max_tokens=400, stream=True))
        eventually(lambda: server.engine.waiting() == 1)
        drain(server, 0.1)
    for reply in (whole.result(), stream.result()):
        assert (reply.status, reply.error["code"]) == (503, "shutting_down")


def test_a_drain_ends_a_request_that_is_being_prepared(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    may_load, loading = threading.Event(), threading.Event()

    def slow(image: Image) -> Any:
        loading.set()
        assert may_load.wait(20)
        return cut_crops(image)

    monkeypatch.setattr(encoded, "cut_crops", slow)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(server.ask, chat())
        assert loading.wait(20)
        drained = pool.submit(drain, server, 0.01)
        assert (asked.result(20).status, asked.result().error["code"]) == (503, "shutting_down")
        assert not drained.done()  # the thread goes on
        may_load.set()
        drained.result(20)
    assert server.metric("request_cancelled_total") == 1


def test_a_drain_ends_a_stream_with_an_event(server: HttpServer) -> None:
    server.fusion.backend.before = lambda name: time.sleep(0.01) if name == "decode" else None  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(server.ask, chat(max_tokens=400, stream=True))
        eventually(lambda: any(request.first_piece for request in server.engine._live))
        drain(server, 0.1)
    assert stream.result().status == 200
    last = stream.result().body.decode().split("\n\n")[-2]
    assert '"code": "shutting_down"' in last


def test_the_end_of_the_application_frees_the_model(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http_server(lambda: watched_fusion(tiny_bundle), monkeypatch) as server:
        eventually(lambda: server.engine.loaded.done())
        fusion = server.fusion
    assert fusion.backend.closed == 1  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fusion-edge ask")]


def test_a_model_that_is_loaded_too_late_is_freed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_load = threading.Event()
    loaded: list[Fusion] = []

    def load() -> Fusion:
        assert may_load.wait(20)
        loaded.append(watched_fusion(tiny_bundle))
        return loaded[0]

    with http_server(load, monkeypatch) as server:
        pass
    assert server.server.error is None
    may_load.set()
    eventually(lambda: bool(loaded) and backend(loaded[0]).closed == 1)


def test_applications_share_nothing() -> None:
    settings = ServeSettings(Path("x"), "x", queue=3)
    first, second = make_app(settings), make_app(pickle.loads(pickle.dumps(settings)))
    assert first is not second
    assert pickle.loads(pickle.dumps(settings)) == settings
