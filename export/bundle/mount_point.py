"""Outputs that are mount points, such as a container's volumes: nothing can be renamed to them, or from beside them."""

from __future__ import annotations

import os
import re
from pathlib import Path

PURPOSES = ("partial", "replaced", "calibration")
"""Of hidden folders: what is being written, what is being replaced, what a calibration keeps."""
_MOUNTS = Path("/proc/self/mountinfo")


def is_mount_point(folder: Path) -> bool:
    """Whether a file system, or a part of one, is mounted at ``folder``, which is absolute and without links."""
    return os.path.ismount(folder) or str(folder) in _mounted()  # the former misses a part of the same file system


def _mounted() -> set[str]:
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # not Linux, or hidden in a container
        return set()
    paths = (line.split()[4] for line in lines)  # in which spaces and the like are octal numbers
    return {os.fsdecode(re.sub(rb"\\(\d{3})", lambda found: bytes([int(found[1], 8)]), path)) for path in paths}


def workplace(output: Path) -> Path:
    """Where commands that write ``output`` have hidden folders: beside it, or in it if it is a mount point."""
    return output if is_mount_point(output) else output.parent


def hidden_folder(output: Path, purpose: str) -> Path:
    """The hidden folder of one of :data:`PURPOSES` for ``output``."""
    return workplace(output) / f".{output.name}.{purpose}"


def hidden_in(output: Path) -> tuple[str, ...]:
    """Names in a mount point that are no part of what is written there; none if it is another folder."""
    hidden = (hidden_folder(output, "partial").name, hidden_folder(output, "calibration").name)
    return (*hidden, "lost+found") if is_mount_point(output) else ()  # the last is a file system's own
