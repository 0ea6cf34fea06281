"""Compare fusion-serve with llama.cpp's llama-server: refusals, clients that leave, memory.

    python -m fusion_edge.benchmarks.serving.against_llama_server BUNDLE --llama-server FILE --gguf FILE --json FILE

Both serve the same LLM in 4 bits with the same threads. They take turns, each time in a new process. The bundle's
questions have a picture, which its vision encoder sees first. llama-server gets a text of about as many tokens. Answers
are sampled, so that random weights give long ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.serving.server_process import Client, ServerProcess, body, picture, send, server_process
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole

THREADS = 2
QUESTION = "What is in the picture?"
LLAMA_SERVER = {"llama-server": (), "llama-server, batches of 64": ("--batch-size", "64")}
"""Options by the name of the setting. llama-server looks for cancelled requests between two batches."""
WORDS = ("red", "blue", "circle", "left", "under", "two")
REFUSALS = 50
QUEUE = 8
REFUSALS_OF_A_FULL_QUEUE = 10
PATIENCE_SECONDS = 1.0
"""How long to wait for the refusal of a full queue."""
POLL_SECONDS = 0.002
SAMPLE_SECONDS = 0.01
QUIET_SECONDS = 0.5
QUIET_SHARE = 0.3
"""Of a processor, in a sample: a process that uses less is quiet. Timers of an idle server use less than a tenth."""

Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Server:
    """A server to measure."""

    process: ServerProcess
    question: Callable[..., bytes]
    """Returns the body of the question of a number, with further fields of the request."""
    is_idle: Callable[[Client], bool]
    version: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("bundle", type=Path, help="bundle folder")
    add("--llama-server", type=Path, required=True, metavar="FILE", help="the program of llama.cpp")
    add("--gguf", type=Path, required=True, metavar="FILE", help="the bundle's LLM for llama.cpp")
    add("--words", type=positive_integer, default=320, help="of llama-server's prompt (default: %(default)s)")
    add("--rounds", type=positive_integer, default=3, help="(default: %(default)s)")
    add("--cancels", type=positive_integer, default=12, help="clients that leave a round, of each kind (default: 12)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    contestants: dict[str, Callable[[], AbstractContextManager[Server]]] = {
        "fusion-serve": partial(fusion_serve, options.bundle)
    }
    for name, setting in LLAMA_SERVER.items():
        contestants[name] = partial(llama_server, options.llama_server, options.gguf, options.words, setting)
    found: dict[str, Figures] = {name: {} for name in contestants}
    machine, loads, version = machine_info(None), [], ""
    for number in range(options.rounds):
        for name, start in contestants.items():
            sys.stderr.write(f"round {number + 1} of {options.rounds}: {name}\n")
            loads.append(os.getloadavg()[0])
            with start() as server:
                for figure, values in measure(server, options.cancels).items():
                    found[name].setdefault(figure, []).extend(values)
                version = server.version or version
    result = {
        "machine": asdict(machine),
        "load_averages": [round(load, 2) for load in loads],
        "llama_cpp": version,
        "settings": {"threads": THREADS, "queue": QUEUE, "rounds": options.rounds, "words": options.words},
        "servers": {name: {figure: summary(each) for figure, each in of.items()} for name, of in found.items()},
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        write_whole(options.json, text)
    return 0


def summary(values: Sequence[float]) -> dict[str, float] | None:
    """Return median, minimum, maximum and count; None without values."""
    if not values:
        return None
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 2) for name, value in found.items()} | {"count": len(values)}


@contextmanager
def fusion_serve(bundle: Path) -> Iterator[Server]:
    """Serve a bundle."""
    with server_process(bundle, ["--threads", str(THREADS), "--queue", str(QUEUE)]) as process:

        def is_idle(client: Client) -> bool:
            return client.metric("num_requests_running") + client.metric("num_requests_waiting") == 0

        def question(number: int, **fields: Any) -> bytes:
            return body(picture(number), QUESTION, temperature=1, seed=number, **fields)

        yield Server(process, question, is_idle)


@contextmanager
def llama_server(program: Path, model: Path, words: int, setting: Sequence[str]) -> Iterator[Server]:
    """Serve a GGUF file, one request at a time, without its prompt cache: every question is a new picture."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--parallel", "1"]
    command += ["--threads", str(THREADS), "--ctx-size", "4096", "--no-cache-prompt", "--cache-ram", "0"]
    command += ["--no-jinja", "--chat-template", "phi3", *setting]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            while not _is_healthy(port):
                time.sleep(0.1)
                if process.poll() is not None:
                    raise RuntimeError(f"{program} ended with {process.returncode}.")

            def is_idle(client: Client) -> bool:
                return not any(slot["is_processing"] for slot in json.loads(client.request("GET", "/slots").body))

            version = json.loads(Client(port).request("GET", "/props").body)["build_info"]
            yield Server(ServerProcess(process, port), partial(_text_question, words), is_idle, version)
        finally:
            process.terminate()


def _is_healthy(port: int) -> bool:
    try:
        return Client(port).request("GET", "/health").status == 200
    except OSError:
        return False


def _text_question(words: int, number: int, **fields: Any) -> bytes:
    text = " ".join(random.Random(number).choices(WORDS, k=words))
    message = {"role": "user", "content": f"{text} {QUESTION}"}
    request = {"messages": [message], "max_tokens": 512, "temperature": 1, "seed": number}
    return json.dumps(request | fields).encode()


def measure(server: Server, cancels: int) -> Figures:
    """Return the figures of a server that has just loaded its model."""
    figures: Figures = {f"idle_{name}_mb": [size] for name, size in memory(server.process).items()}
    response = server.process.client().request("POST", "/v1/chat/completions", server.question(0, max_tokens=1))
    figures["prompt_tokens"] = [json.loads(response.body)["usage"]["prompt_tokens"]]
    first = _first_text(server, 1)
    figures["first_text_ms"] = [1000 * first]
    figures |= {f"idle_after_answers_{name}_mb": [size] for name, size in memory(server.process).items()}
    figures["refused_ms"] = [_refusal(server) for _ in range(REFUSALS)]
    with send(server.process.port, server.question(2, stream=True)):
        time.sleep(0.1 * first)
        figures["refused_beside_a_question_ms"] = [_refusal(server) for _ in range(REFUSALS)]
    _quiet(server, time.perf_counter())
    figures["refused_by_a_full_queue_ms"] = _full_queue(server)
    moments, numbers = random.Random(0), itertools.count(300)  # no picture comes again: its features are cached
    for _ in range(cancels):
        for name, until in {"slot_free": _free, "processors_idle": _quiet}.items():
            for place, moment in {"before_the_text": moments.uniform(0.1, 0.9) * first, "in_the_answer": None}.items():
                taken = _leave(server, next(numbers), moment, until)
                figures.setdefault(f"leaves_{place}_{name}_ms", []).append(taken)
    return figures


def memory(process: ServerProcess) -> dict[str, float]:
    """Return the memory of a process in megabytes: resident, proportional (PSS), and without files."""
    rollup = Path(f"/proc/{process.process.pid}/smaps_rollup").read_text()
    rows = {"resident": "Rss", "proportional": "Pss", "anonymous": "Anonymous"}
    return {name: 1024e-6 * int(rollup.partition(f"\n{row}:")[2].split()[0]) for name, row in rows.items()}


def _refusal(server: Server) -> float:
    """Return the milliseconds to the first byte of the refusal of a request without messages, on a new connection."""
    start = time.perf_counter()
    with send(server.process.port, b'{"model": "measured"}') as connection:
        first = connection.recv(65536)
        seconds = time.perf_counter() - start
    assert first.split(b" ", 2)[1] == b"400", first
    return 1000 * seconds


def _first_text(server: Server, number: int) -> float:
    """Return the seconds until the first text of an answer; then leave."""
    start = time.perf_counter()
    with send(server.process.port, server.question(number, stream=True)) as connection:
        read_text(connection)
        seconds = time.perf_counter() - start
    _quiet(server, time.perf_counter())
    return seconds


def read_text(connection: socket.socket) -> bool:
    """Read up to an event with text. Return False for an answer without text."""
    received = b""
    while not has_text(received):
        if b"data: [DONE]\n" in received:
            return False
        part = connection.recv(65536)
        assert part, received
        received += part
    return True


def has_text(received: bytes) -> bool:
    """Return whether a complete event of a stream has text."""
    events = [line.removeprefix(b"data: ") for line in received.split(b"\n")[:-1] if line.startswith(b"data: {")]
    choices = [choice for event in events for choice in json.loads(event).get("choices", ())]
    return any(choice["delta"].get("content") for choice in choices)


def _full_queue(server: Server) -> list[float]:
    """Return the milliseconds to the first bytes of refusals while one question runs and :data:`QUEUE` wait."""
    connections, taken = [], []
    try:
        for number in range(QUEUE + 1):
            connections.append(send(server.process.port, server.question(100 + number, stream=True)))
            time.sleep(0.02)  # so that they arrive in this order
        for number in range(REFUSALS_OF_A_FULL_QUEUE):
            request, start = server.question(200 + number, stream=True), time.perf_counter()
            with send(server.process.port, request) as connection:
                connection.settimeout(PATIENCE_SECONDS)
                try:
                    first = connection.recv(65536)
                except TimeoutError:
                    break
                taken.append(1000 * (time.perf_counter() - start))
                assert first.split(b" ", 2)[1] == b"429", first
    finally:
        for connection in connections:
            connection.close()
    _quiet(server, time.perf_counter())
    return taken


def _leave(server: Server, number: int, moment: float | None, until: Callable[[Server, float], float]) -> float:
    """Close a connection some seconds after its question, or in its answer. Return the milliseconds that it lasts."""
    connection = send(server.process.port, server.question(number, stream=True))
    if moment is not None:
        time.sleep(moment)
    elif not read_text(connection):
        connection.close()
        return _leave(server, 1000 + number, moment, until)
    start = time.perf_counter()
    connection.close()
    taken = until(server, start)
    _quiet(server, time.perf_counter())
    return 1000 * taken


def _free(server: Server, start: float) -> float:
    """Wait until no question runs or waits. Return the seconds from a moment until then."""
    client = server.process.client()
    while not server.is_idle(client):
        time.sleep(POLL_SECONDS)
    return time.perf_counter() - start


def _quiet(server: Server, start: float) -> float:
    """Wait until the server's processors are idle. Return the seconds from a moment until then."""
    last, sampled, used = start, time.perf_counter(), processor_seconds(server.process)
    while True:
        time.sleep(SAMPLE_SECONDS)
        now, using = time.perf_counter(), processor_seconds(server.process)
        if using - used > QUIET_SHARE * (now - sampled):
            last = now
        elif now - last > QUIET_SECONDS:
            if server.is_idle(server.process.client()):
                return last - start
            last = now
        sampled, used = now, using


def processor_seconds(process: ServerProcess) -> float:
    """Return the processor time of a process's threads."""
    total = 0
    for thread in Path(f"/proc/{process.process.pid}/task").iterdir():
        try:
            total += int((thread / "schedstat").read_text().split()[0])
        except OSError:  # it has ended
            continue
    return 1e-9 * total


if __name__ == "__main__":
    sys.exit(main())
