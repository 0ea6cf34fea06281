"""Keys, and streams whose replica dies."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from http.client import IncompleteRead

import pytest
from ray_serve.client import Server, chat

ray = pytest.importorskip("ray", reason="Ray is not installed; .ci/ray installs it")

LONG = {"type": "json_schema", "json_schema": {"name": "long", "schema": {"type": "string", "pattern": "^a{300}$"}}}
"""Shape of an answer that takes some hundred tokens."""
RUNS = tuple(
    f"fusion_{name}_total" for name in ("request_success", "request_cancelled", "request_late", "request_failed")
)
"""Starts of the metrics that count a request once it has run."""


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic YTpi"}])
def test_a_request_without_the_key_is_refused(guarded: Server, headers: dict[str, str]) -> None:
    before = runs(guarded)
    asked = replace(guarded, headers=headers).ask(chat(0))
    assert (asked.status, asked.body["error"]["code"]) == (401, "invalid_api_key")
    assert runs(guarded) == before


def test_a_key_allows_every_host(guarded: Server, server: Server) -> None:
    assert guarded.ask(chat(0, max_tokens=1), Host="robot.example").status == 200
    assert server.ask(chat(0, max_tokens=1), Host="robot.example").status == 421


def test_a_stream_whose_replica_is_killed_ends_with_an_error(guarded: Server) -> None:
    """The request does not run again: its client has text of the first run."""
    before = runs(guarded)
    body = json.dumps(chat(1, max_tokens=400, stream=True, response_format=LONG))
    connection, response = guarded.open("POST", "/v1/chat/completions", body)
    victim = response.headers["x-fusion-replica"]
    assert response.status == 200
    events = response.readline()
    (name,) = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].endswith(victim)]
    ray.kill(ray.get_actor(name, namespace="serve"))
    with pytest.raises((IncompleteRead, ConnectionError)):
        events += response.read()
    connection.close()
    assert b"data: " in events
    assert b"[DONE]" not in events
    time.sleep(3)  # a second run would have begun, and ended with its client
    after = runs(guarded, without=victim)
    (survivor,) = before.keys() & after.keys()
    assert after == {survivor: before[survivor]} | {name: 0 for name in after if name != survivor}


def runs(server: Server, without: str = "") -> dict[str, float]:
    """Return how many requests each of the two replicas has run, by its name.

    ``without`` is the name of one that was killed: this waits until another one replaces it.
    """
    found: dict[str, float] = {}
    end = time.monotonic() + 60
    while len(found) < 2:
        assert time.monotonic() < end, f"Only these replicas answer: {list(found)}."
        name, values = server.metrics()
        if name != without:
            found[name] = sum(value for metric, value in values.items() if metric.startswith(RUNS))
    return found
