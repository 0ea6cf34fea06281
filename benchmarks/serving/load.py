"""Load on fusion-serve: what clients get, and how the server's memory grows. :mod:`.overhead` has one client.

    python -m fusion_edge.benchmarks.serving.load BUNDLE --seconds 60 --json FILE

Exit code 1: an answer was lost, doubled or wrong, a refusal was no 429, or memory grew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.serving.server_process import (
    ServerProcess,
    body,
    milliseconds,
    picture,
    probing,
    send,
    server_process,
)
from fusion_edge.runtime import load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole

QUESTION = "What is at the top right?"
PICTURES = 4
LIMIT_GROWTH = 4 << 20
"""Bytes by which the second half's largest memory may exceed the first half's, while the allocator settles."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--clients", type=positive_integer, default=64, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=positive_integer, default=60, help="(default: %(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    parser.add_argument("--cancels", type=positive_integer, default=50, help="(default: %(default)s)")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    with load(options.bundle, cached_images=PICTURES) as fusion:
        expected = [fusion.answer(picture(seed), QUESTION).text for seed in range(PICTURES)]
    with server_process(options.bundle, ["--cached-images", str(PICTURES)]) as server:
        idle = server.memory()
        cancels = measure_cancels(server, options.cancels)
    with server_process(options.bundle, ["--queue", "8", "--cached-images", str(PICTURES)]) as server:
        result, is_right = measure_load(server, expected, options.clients, options.seconds)
    text = json.dumps(
        {
            "command": "python -m fusion_edge.benchmarks.serving.load BUNDLE "
            f"--clients {options.clients} --seconds {options.seconds} --cancels {options.cancels}",
            "machine": asdict(machine_info(None)),
            "idle_anonymous_bytes": idle,
            "cancels": cancels,
            "load": result,
        },
        indent=2,
    )
    sys.stdout.write(text + "\n")
    if options.json:
        write_whole(options.json, text + "\n")
    return 0 if is_right else 1


def measure_cancels(server: ServerProcess, count: int) -> dict[str, Any]:
    """Close connections at random moments of an answer. Return the times until the worker is free again.

    A time includes the request for the metrics that sees it. Every question has a new picture. Clients that leave
    before their question is queued, or after its answer, do not count.
    """
    client, moments, taken = server.client(), random.Random(0), list[float]()
    new = (body(picture(seed), QUESTION, stream=True) for seed in itertools.count(PICTURES))
    seconds = statistics.median(client.request("POST", "/v1/chat/completions", next(new)).seconds for _ in range(5))
    while len(taken) < count:
        before, request = client.metric("request_cancelled_total"), next(new)
        connection = send(server.port, request)
        time.sleep(moments.uniform(0, seconds))
        start = time.perf_counter()
        connection.close()
        while client.metric("num_requests_running") + client.metric("num_requests_waiting"):
            pass
        end = time.perf_counter()
        if client.metric("request_cancelled_total") > before:
            taken.append(end - start)
    return {"count": count, "free_ms": milliseconds(taken), "largest_ms": round(1000 * max(taken), 2)}


def measure_load(
    server: ServerProcess, expected: Sequence[str], clients: int, seconds: int
) -> tuple[dict[str, Any], bool]:
    """Have clients ask without a pause. Return the figures, and whether every request had its one right answer."""
    requests = [body(picture(seed), QUESTION) for seed in range(len(expected))]
    statuses: Counter[int] = Counter()
    answered: list[float] = []
    refused: list[float] = []
    ids: set[str] = set()
    wrong = 0
    lock, due = threading.Lock(), time.monotonic() + seconds

    def ask(number: int) -> None:
        nonlocal wrong
        client, turn = server.client(), number
        while time.monotonic() < due:
            turn += 1
            response = client.request("POST", "/v1/chat/completions", requests[turn % len(requests)])
            content = json.loads(response.body)
            with lock:
                statuses[response.status] += 1
                if response.status == 200:
                    answered.append(response.seconds)
                    ids.add(content["id"])
                    wrong += content["choices"][0]["message"]["content"] != expected[turn % len(requests)]
                else:
                    refused.append(response.seconds)
                    wrong += content["error"]["code"] != "queue_full"
            if response.status == 429:
                time.sleep(min(1.0, int(response.headers["retry-after-ms"]) / 1000))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    memory = []
    with probing(server) as health:
        for thread in threads:
            thread.start()
        while time.monotonic() < due:
            time.sleep(1)
            memory.append(server.memory())
        for thread in threads:
            thread.join()
    client = server.client()
    counted = {"answered": client.metric("request_success_total"), "refused": client.metric("request_refused_total")}
    halves = max(memory[: len(memory) // 2]), max(memory[len(memory) // 2 :])
    is_right = (
        wrong == 0
        and set(statuses) <= {200, 429}
        and len(ids) == statuses[200] == counted["answered"]
        and statuses[429] == counted["refused"]
        and client.metric("num_requests_running") + client.metric("num_requests_waiting") == 0
        and halves[1] - halves[0] <= LIMIT_GROWTH
    )
    result = {
        "clients": clients,
        "seconds": seconds,
        "statuses": dict(statuses),
        "wrong": wrong,
        "counted_by_the_server": counted,
        "answered_ms": milliseconds(answered),
        "refused_ms": milliseconds(refused),
        "health_ms": milliseconds(health),
        "anonymous_bytes": {"first_half": halves[0], "second_half": halves[1], "every_10_seconds": memory[::10]},
        "is_right": is_right,
    }
    return result, is_right


if __name__ == "__main__":
    sys.exit(main())
