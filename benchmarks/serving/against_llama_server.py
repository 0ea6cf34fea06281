"""Compare fusion-serve with llama.cpp's llama-server: memory, refusals, and how soon a client that leaves is noticed.

    python -m fusion_edge.benchmarks.serving.against_llama_server BUNDLE --llama-server FILE --gguf FILE --json FILE

Both serve the same LLM in 4 bits on the same threads. The bundle's questions have a picture, with vision encoder and
alignment. llama-server gets a text of about as many tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.serving.server_process import (
    Client,
    ServerProcess,
    body,
    milliseconds,
    picture,
    send,
    server_process,
)
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole

THREADS = 2
QUESTION = "What is in the picture?"
WORDS = 850
"""Words of llama-server's prompt: about the tokens of a question with a picture."""
REFUSALS = 200
QUEUE = 8
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Server:
    """A server to measure."""

    process: ServerProcess
    ask: Callable[[int], bytes]
    """Returns the body of the question of a number, which streams a long answer."""
    is_idle: Callable[[Client], bool]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("bundle", type=Path, help="bundle folder")
    add("--llama-server", type=Path, required=True, metavar="FILE", help="the program of llama.cpp")
    add("--gguf", type=Path, required=True, metavar="FILE", help="the bundle's LLM for llama.cpp")
    add("--cancels", type=positive_integer, default=30, help="clients that leave, of each kind (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    with fusion_serve(options.bundle) as server:
        result = {"fusion-serve": measure(server, options.cancels)}
    with llama_server(options.llama_server, options.gguf) as server:
        result["llama-server"] = measure(server, options.cancels)
    text = json.dumps({"machine": asdict(machine_info(None)), "servers": result}, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        write_whole(options.json, text)
    return 0


@contextmanager
def fusion_serve(bundle: Path) -> Iterator[Server]:
    """Serve a bundle."""
    with server_process(bundle, ["--threads", str(THREADS), "--queue", str(QUEUE)]) as process:

        def is_idle(client: Client) -> bool:
            return client.metric("num_requests_running") + client.metric("num_requests_waiting") == 0

        yield Server(process, lambda number: body(picture(number), QUESTION, stream=True), is_idle)


@contextmanager
def llama_server(program: Path, model: Path) -> Iterator[Server]:
    """Serve a GGUF file, one request at a time, without its prompt cache: every question is a new picture."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--parallel", "1"]
    command += ["--threads", str(THREADS), "--ctx-size", "4096", "--no-cache-prompt"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            while not _is_healthy(port):
                time.sleep(0.1)
                if process.poll() is not None:
                    raise RuntimeError(f"{program} ended with {process.returncode}.")

            def is_idle(client: Client) -> bool:
                return not any(slot["is_processing"] for slot in json.loads(client.request("GET", "/slots").body))

            yield Server(ServerProcess(process, port), _text_question, is_idle)
        finally:
            process.terminate()


def _is_healthy(port: int) -> bool:
    try:
        return Client(port).request("GET", "/health").status == 200
    except OSError:
        return False


def _text_question(number: int) -> bytes:
    words = " ".join(random.Random(number).choices(("red", "blue", "circle", "left", "under", "two"), k=WORDS))
    message = {"role": "user", "content": f"{words} {QUESTION}"}
    fields = {"stream": True, "max_tokens": 512, "temperature": 0, "ignore_eos": True}
    return json.dumps({"messages": [message]} | fields).encode()


def measure(server: Server, cancels: int) -> dict[str, Any]:
    """Return the figures of a server."""
    client = server.process.client()
    anonymous, resident = server.process.memory(), server.process.memory("VmRSS")
    prompt = _first_text(server, 0)
    return {
        "idle_anonymous_bytes": anonymous,
        "idle_resident_bytes": resident,
        "first_text_ms": round(1000 * prompt, 1),
        "invalid_request_ms": milliseconds([_refusal(client) for _ in range(REFUSALS)]),
        "beside_a_full_queue": _full_queue(server),
        "leaves_before_the_first_text_ms": _leave(server, cancels, lambda moments: moments.uniform(0.1, 0.9) * prompt),
        "leaves_in_the_answer_ms": _leave(server, cancels, None),
    }


def _refusal(client: Client) -> float:
    """Return the seconds until an invalid request is refused."""
    request = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": "many"}
    response = client.request("POST", "/v1/chat/completions", json.dumps(request).encode())
    assert 400 <= response.status < 500, response.body
    return response.seconds


def _first_text(server: Server, number: int) -> float:
    """Return the seconds until the first text of an answer; then leave."""
    start = time.perf_counter()
    with send(server.process.port, server.ask(number)) as connection:
        _read_text(connection)
        seconds = time.perf_counter() - start
    _until_idle(server)
    return seconds


def _read_text(connection: socket.socket) -> None:
    """Read up to a chunk with text."""
    received = b""
    while b'"content":"' not in received.replace(b'"content": "', b'"content":"').replace(b'"content":""', b""):
        part = connection.recv(65536)
        assert part, received
        received += part


def _full_queue(server: Server) -> dict[str, Any]:
    """Send a request more than run and wait. Return its status and the milliseconds to its first byte, if any."""
    connections = []
    try:
        for number in range(QUEUE + 2):
            connections.append(send(server.process.port, server.ask(1000 + number)))
            time.sleep(0.05)  # so that they arrive in this order
        last, start = connections[-1], time.perf_counter()
        last.close()
        connections[-1] = last = send(server.process.port, server.ask(2000))
        last.settimeout(1)
        try:
            status = int(last.recv(65536).split(b" ", 2)[1])
        except TimeoutError:
            return {"status": None, "ms": None}
        return {"status": status, "ms": round(1000 * (time.perf_counter() - start), 2)}
    finally:
        for connection in connections:
            connection.close()
        _until_idle(server)


def _leave(server: Server, count: int, moment: Callable[[random.Random], float] | None) -> dict[str, float]:
    """Close connections at a moment after the request, or within the answer; return the times until it is idle."""
    moments, taken = random.Random(0), []
    for number in range(count):
        connection = send(server.process.port, server.ask(3000 + number))
        if moment is None:
            _read_text(connection)
        else:
            time.sleep(moment(moments))
        start = time.perf_counter()
        connection.close()
        _until_idle(server)
        taken.append(time.perf_counter() - start)
    return milliseconds(taken)


def _until_idle(server: Server) -> None:
    client = server.process.client()
    while not server.is_idle(client):
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
