"""The server's replicas on Ray Serve: one request, one answer, also when a replica dies."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed; .ci/ray installs it")

from ray_serve.client import QUESTION, Answer, Server, chat, picture

from fusion_edge.runtime import load
from fusion_edge.runtime.serve.ray_app import Arguments, picture_digest


def replicas() -> list[int]:
    """Return the process ids of the replicas."""
    names = {int(path.parent.name): path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, name in names.items() if name.startswith(b"ray::ServeReplica:default:Replica")]


def test_an_answer_is_the_model_s(server: Server, tiny_bundle: Path) -> None:
    with load(tiny_bundle) as fusion:
        expected = fusion.answer(picture(0), QUESTION).text
    asked = server.ask(chat(0, max_tokens=512))
    assert (asked.status, asked.text) == (200, expected)


def test_an_error_has_openai_s_form(server: Server) -> None:
    asked = server.ask(chat(0, model="other"))
    assert (asked.status, asked.body["error"]["code"]) == (404, "model_not_found")


def test_a_body_over_the_limit_is_refused(server: Server) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(18 << 20))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "request_too_large")
    connection.close()


def test_questions_about_a_picture_reach_the_replica_that_has_it(server: Server) -> None:
    first = {seed: server.ask(chat(seed)).replica for seed in (11, 12, 13)}
    time.sleep(3)  # until the routers know
    later = [(seed, server.ask(chat(seed)).replica) for seed in (11, 12, 13, 13, 12, 11)]
    assert later == [(seed, first[seed]) for seed, _ in later]


def test_a_full_queue_is_an_error_of_its_own(server: Server) -> None:
    """Two replicas run one and keep four each, and the router keeps four."""
    with ThreadPoolExecutor(40) as pool:
        asked = list(pool.map(lambda seed: server.ask(chat(seed, max_tokens=100)), range(100, 140)))
    counted = Counter((one.status, one.body.get("error", {}).get("code")) for one in asked)
    assert counted.keys() == {(200, None), (429, "queue_full")}
    assert all("retry-after" in one.headers for one in asked if one.status == 429)


def ask_until_there_is_room(server: Server, body: dict[str, Any]) -> Answer:
    """Ask again after each refusal by a full queue, as OpenAI's clients do."""
    while (answer := server.ask(body)).status == 429:
        time.sleep(0.1)
    return answer


def test_no_request_is_lost_when_a_replica_is_killed(server: Server) -> None:
    seeds = [200 + i % 4 for i in range(32)]
    expected = {seed: server.ask(chat(seed)).text for seed in set(seeds)}
    victim = replicas()[0]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask_until_there_is_room, server, chat(seed)) for seed in seeds]
        asked[4].result()
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in asked]
    assert [(one.status, one.body.get("error")) for one in answers] == [(200, None)] * len(seeds)
    assert [one.text for one in answers] == [expected[seed] for seed in seeds]
    assert victim not in replicas()


@pytest.mark.parametrize("body", [b"", b"{", b'{"url": 3}', b'{"text": "hello"}'])
def test_a_body_without_a_picture_has_no_digest(body: bytes) -> None:
    assert picture_digest(body) == ""


def test_the_digest_is_that_of_the_first_picture() -> None:
    first, second = (json.dumps(chat(seed)).encode() for seed in (1, 2))
    other = json.dumps(chat(1, max_tokens=3, temperature=0.5)).encode()
    assert picture_digest(first) == picture_digest(other) != picture_digest(second)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="replica"):
        Arguments.model_validate({"bundle": "b", "replica": "2"})


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValueError, match="max_replicas is 1"):
        Arguments.model_validate({"bundle": "b", "replicas": "2", "max_replicas": "1"})
