"""Two replicas on Ray Serve, for all tests of this folder. ``.ci/ray`` installs Ray and runs them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def port(tiny_bundle: Path) -> Iterator[int]:
    """Port of the application on the loopback, with two replicas of the tiny model."""
    # Ray starts a dozen processes; its default patience is too short for two busy cores.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60")
    import ray
    from ray import serve

    from fusion_edge.runtime.serve.ray_app import Arguments, app

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": number})
    serve.run(app(Arguments(bundle=tiny_bundle, model_name="tiny", replicas=2, queue=4)))
    yield number
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
