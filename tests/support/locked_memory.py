"""Memory that this process has locked."""

from __future__ import annotations

import re
from pathlib import Path


def locked_bytes() -> int:
    """Return the bytes that this process has locked."""
    return 1024 * int(re.findall(r"^VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[0])
