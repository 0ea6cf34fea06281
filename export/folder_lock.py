"""A folder that one process at a time may use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion_edge.runtime.errors import FusionError


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold ``folder``, made if absent, for this process alone. Raises :class:`FusionError` (``busy``) if it is held."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have renamed or removed what was opened here a moment ago.
            is_held = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            is_held = False
        if not is_held:
            raise FusionError(busy)
        yield
    finally:
        os.close(descriptor)
