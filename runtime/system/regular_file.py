"""Open files of unknown origin."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fusion_edge.runtime.errors import FusionError


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises :class:`FusionError` for a folder, pipe or device, and ``OSError``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FusionError(f"{path} is a folder, pipe or device; expected a regular file. Replace it by the file.")
    return descriptor
