"""What the benchmarks of the server compute besides asking it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes.watched_backend import watched_fusion

from fusion_edge.benchmarks.serving import overhead
from fusion_edge.benchmarks.serving.server_process import Response, body, picture


def test_overhead_is_the_difference_of_the_medians() -> None:
    seconds = overhead.Seconds([0.010, 0.020, 0.5], [0.012, 0.0225, 0.9])
    assert seconds.overhead() == 2.5
    assert seconds.summary()["http_ms"]["p50"] == 22.5


class FakeClient:
    """Records requests, and answers as the model does."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.urls: list[str] = []

    def request(self, method: str, path: str, content: bytes) -> Response:
        self.urls.append(json.loads(content)["messages"][0]["content"][1]["image_url"]["url"])
        return Response(200, {}, json.dumps({"choices": [{"message": {"content": self.text}}]}).encode(), 0.25)


def test_both_sides_get_the_same_pictures(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched_fusion(tiny_bundle) as fusion:
        asked: list[Any] = []
        client = FakeClient("red")

        def ask(_: object, subject: Any) -> tuple[float, str]:
            asked.append(subject)
            return 0.125, "red"

        monkeypatch.setattr(overhead, "_ask", ask)
        pairs = overhead.by_turns(fusion, client, itertools.count(1))  # type: ignore[arg-type]
        assert list(itertools.islice(pairs, 3)) == [((0.125, 0.25), (0.125, 0.25))] * 3
    assert len({id(crops) for crops in asked[::2]}) == 1
    assert len(set(client.urls[::2])) == 1
    assert len(set(client.urls[1::2])) == 3
    for number, pixels in enumerate(asked[1::2], 1):
        assert (pixels == picture(number)).all()


def test_a_wrong_answer_is_an_error(tiny_bundle: Path) -> None:
    with watched_fusion(tiny_bundle) as fusion:
        pairs = overhead.by_turns(fusion, FakeClient("no answer of the model"), itertools.count(1))  # type: ignore[arg-type]
        with pytest.raises(AssertionError):
            next(pairs)


def test_decoding_is_measured() -> None:
    assert all(seconds > 0 for seconds in overhead.decoding_seconds(3))


HOOKS = """
from fusion_edge.benchmarks.serving import schemathesis_hooks as hooks

class Case:
    class operation:
        label = "POST /x"
    def __init__(self, headers, body):
        self.headers, self.body = headers, body

class Response:
    def __init__(self, status):
        self.status_code = status

def passes(status, headers, body):
    try:
        hooks.server_error_without_reason(None, Response(status), Case(headers, body))
    except AssertionError:
        return False
    return True

assert passes(200, {}, {}) and passes(429, None, None)
assert passes(504, {"x-request-deadline-ms": "5"}, {})
assert passes(504, {}, {"fusion": {"deadline_ms": 5}})
assert not passes(504, {}, {"fusion": {"deadline_ms": None}})
assert not passes(504, {}, {"fusion": None}) and not passes(504, None, [])
assert not passes(503, {"x-request-deadline-ms": "5"}, {}) and not passes(500, {}, {"fusion": {"deadline_ms": 5}})

generated = {"model": "measured", "messages": [{"role": "user", "content": "x"}], "temperature": 1, "top_p": 0.5}
found = [hooks.answerable(generated, number) for number in range(4000)]
assert all(each["messages"] == hooks._MESSAGES and each["model"] == "measured" for each in found)
assert {len(each) for each in found} == {2, 3, 4}
late = {"model": "measured", "messages": [], "fusion": {"deadline_ms": 1}}
kept = [hooks.answerable(late, number).get("fusion", {}).get("deadline_ms") for number in range(4000)]
assert set(kept) == {None, 1, 60000} and kept.count(1) < kept.count(60000)
"""


def test_the_hooks_of_generated_requests(tmp_path: Path) -> None:
    """In a process of their own, because they are registered for all tests of one."""
    pytest.importorskip("schemathesis")
    counts = tmp_path / "counts.json"
    messages = json.loads(body(picture(0)[:8, :8], "What?"))["messages"]
    environment = os.environ | {"FUSION_COUNTS": str(counts), "FUSION_MESSAGES": json.dumps(messages)}
    subprocess.run([sys.executable, "-c", HOOKS], env=environment, check=True, timeout=60)
    assert json.loads(counts.read_text()) == {
        "POST /x 200": 1,
        "POST /x 429": 1,
        "POST /x 500": 1,
        "POST /x 503": 1,
        "POST /x 504": 5,
    }
