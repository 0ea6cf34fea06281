"""Applications on Ray Serve, for all tests of this folder. ``.ci/ray`` installs Ray and runs them."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_serve.client import Server
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.export import cli

KEY = 32 * "k"


@pytest.fixture(scope="session")
def server(tiny_bundle: Path) -> Iterator[Server]:
    """Two replicas of the tiny model, without keys."""
    # Ray starts a dozen processes; its default patience is too short for two busy cores.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60")
    import ray
    from ray import serve

    from fusion_edge.runtime.serve.ray_app import Arguments, app

    terminate = signal.getsignal(signal.SIGTERM)
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(Arguments(bundle=tiny_bundle, model_name="tiny", replicas=2, queue=4)))
    yield Server(port)
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
    signal.signal(signal.SIGTERM, terminate)  # Ray replaces it, and other tests of this process send the signal


@pytest.fixture(scope="session")
def guarded(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Two replicas with keys, of a model that takes seconds for some hundred tokens: it has many layers."""
    from ray import serve

    from fusion_edge.runtime.serve.ray_app import Arguments, app

    folder = tmp_path_factory.mktemp("guarded")
    deep = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, layers=128))
    checkpoint = write_checkpoint(folder / "checkpoint", deep)
    assert cli.main([str(checkpoint), "-o", str(folder / "deep"), "--int4"]) == 0
    keys = folder / "keys"
    keys.touch(0o600)
    keys.write_text(f"{KEY} test\n", encoding="utf-8")
    arguments = Arguments(bundle=folder / "deep", model_name="tiny", replicas=2, queue=4, api_key_file=keys)
    serve.run(app(arguments), name="guarded", route_prefix="/guarded")
    return Server(server.port, "/guarded", {"Authorization": f"Bearer {KEY}"})
