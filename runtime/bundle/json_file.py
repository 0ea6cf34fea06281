"""The JSON files that a bundle brings along, read within bounds: whoever made it may mean harm."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

LARGEST = 2 << 20  # bytes: thirty times the manifest of an 8B model; as Python's objects at most 64 MB


def read_json(path: Path) -> Any:
    """What ``json.loads`` makes of a file.

    Raises :class:`OSError`, ``RecursionError``, and ``ValueError`` for what is no JSON in UTF-8, not a regular file,
    larger than :data:`LARGEST`, or has an object with two values of one name, of which readers take one or the other.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = os.read(descriptor, LARGEST)
    finally:
        os.close(descriptor)
    return json.loads(content.decode("utf-8"), object_pairs_hook=object_of_pairs)


def object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of ``json.loads``. Raises ``ValueError`` for two values of one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:40]!r} is there twice")
    return found
