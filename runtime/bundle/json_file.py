"""A bounded reader of a bundle's JSON files, which are untrusted."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

LARGEST = 2 << 20
"""Limit in bytes: thirty times the manifest of an 8B model, and at most 64 MB as Python objects."""


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises :class:`OSError`, ``RecursionError``, and ``ValueError`` for a file that is not JSON in UTF-8, not a regular
    file, larger than :data:`LARGEST`, or has a duplicate key, which parsers read differently.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for its writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = os.read(descriptor, LARGEST)
    finally:
        os.close(descriptor)
    return json.loads(content.decode("utf-8"), object_pairs_hook=object_of_pairs)


def object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, as ``object_pairs_hook`` of ``json.loads``. Raise ``ValueError`` for a duplicate key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:40]!r} is a duplicate key")
    return found
