"""Send fusion-serve requests that schemathesis generates from its OpenAPI document, and watch its health meanwhile.

    python -m fusion_edge.benchmarks.serving.generated_requests BUNDLE --examples 2000 --json FILE

Needs schemathesis. Exit code 1: a check failed, or the health took too long. A response with the status 504 passes
where its request has a deadline.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.serving.server_process import (
    body,
    milliseconds,
    percentile,
    picture,
    probing,
    server_process,
)
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.serve.chat import DEADLINE_HEADER
from fusion_edge.runtime.system.output_file import write_whole

SCHEMATHESIS = "from schemathesis.cli import schemathesis; schemathesis()"
CONFIGURATION = """
[checks.negative_data_rejection]
expected-statuses = ["4XX", 504]  # 413 among them
"""
LIMIT_SECONDS = 0.1
"""Of the health, 99th percentile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--examples", type=positive_integer, default=2000, help="an operation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    with server_process(options.bundle) as server, tempfile.TemporaryDirectory() as folder, probing(server) as health:
        command = [
            sys.executable, "-c", SCHEMATHESIS, "run", f"http://127.0.0.1:{server.port}/openapi.json",
            "--seed", str(options.seed), "--max-examples", str(options.examples), "--no-shrink",
            "--continue-on-failure",
            # Not the stateful phase: it asks for the list of models, again and again.
            "--phases", "examples,coverage,fuzzing",
            # A schema cannot say that a picture is readable, or that user and assistant take turns.
            # The check of the hooks takes the place of the other one: it knows that a deadline may pass.
            "--exclude-checks", "positive_data_acceptance,not_a_server_error",
        ]  # fmt: skip
        Path(folder, "schemathesis.toml").write_text(CONFIGURATION)
        counts = Path(folder, "counts.json")
        environment = os.environ | {
            "FUSION_COUNTS": str(counts),
            "SCHEMATHESIS_HOOKS": "fusion_edge.benchmarks.serving.schemathesis_hooks",
            "FUSION_MESSAGES": json.dumps(json.loads(body(picture(0)[:32, :32], "Is there a cat?"))["messages"]),
        }
        begin = time.monotonic()
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - begin
        statuses = json.loads(counts.read_text()) if counts.exists() else {}
        client = server.client()
        answered = client.metric("request_success_total")
        late = client.metric("request_late_total")
        failed = client.metric("request_failed_total")
    cases = re.search(r"(\d+) generated", ran.stdout)
    text = json.dumps(
        {
            "command": "python -m fusion_edge.benchmarks.serving.generated_requests BUNDLE "
            f"--examples {options.examples} --seed {options.seed}",
            "machine": asdict(machine_info(None)),
            "seconds": round(seconds),
            "cases": int(cases[1]) if cases else 0,
            "statuses": statuses,
            "answered_by_the_model": answered,
            "ended_by_their_deadline": late,
            "failed_in_the_model": failed,
            "exit_code_of_schemathesis": ran.returncode,
            "findings": re.findall(r"^- (ST\d+ .*)$", ran.stdout, re.MULTILINE),
            "health_ms": milliseconds(health),
        },
        indent=2,
    )
    sys.stdout.write(text + "\n")
    if options.json:
        write_whole(options.json, text + "\n")
    if ran.returncode:
        sys.stderr.write(ran.stdout + ran.stderr)
    return 0 if ran.returncode == 0 and percentile(health, 99) < LIMIT_SECONDS else 1


def has_deadline(headers: Any, body: Any) -> bool:
    """Return whether a request has a deadline, in its header or in its body."""
    if any(name.lower() == DEADLINE_HEADER.lower() for name in headers or {}):
        return True
    options = body.get("fusion") if isinstance(body, dict) else None
    return isinstance(options, dict) and options.get("deadline_ms") is not None


if __name__ == "__main__":
    sys.exit(main())
