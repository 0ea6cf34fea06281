"""fusion-serve as a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = (sys.executable, "-c", "from fusion_edge.runtime.cli.entry import serve; raise SystemExit(serve())")


@contextmanager
def serve_process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve a bundle on a free port. Yields the process and the API's URL, once the model is loaded."""
    command = [*SERVE, str(bundle), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.fullmatch(r"serving \S+ at (http://127\.0\.0\.1:\d+/v1)\n", line):
                    break
            else:
                raise AssertionError(lines)
            yield process, found[1]
        finally:
            process.kill()
