"""Locate the hidden folders of an output: beside it, or inside it if it is a mount point.

A mount point, such as a container's volume, cannot be renamed, nor can anything be renamed to it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PURPOSES = ("partial", "replaced", "calibration")
"""Hidden folders: files being written, files being replaced, results of an unfinished calibration."""
_MOUNTS = Path("/proc/self/mountinfo")


def is_mount_point(folder: Path) -> bool:
    """Return whether a file system is mounted at ``folder``, an absolute path without links. Bind mounts count."""
    return os.path.ismount(folder) or str(folder) in _mounted()  # ismount misses binds of the same file system


def _mounted() -> set[str]:
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # not Linux, or hidden in a container
        return set()
    paths = (line.split()[4] for line in lines)  # spaces and the like are octal escapes
    return {os.fsdecode(re.sub(rb"\\(\d{3})", lambda found: bytes([int(found[1], 8)]), path)) for path in paths}


def hidden_parent(output: Path) -> Path:
    """Return the folder that holds the hidden folders of ``output``."""
    return output if is_mount_point(output) else output.parent


def hidden_folder(output: Path, purpose: str) -> Path:
    """Return the path of the hidden folder of ``output`` for one of :data:`PURPOSES`."""
    return hidden_parent(output) / f".{output.name}.{purpose}"


def hidden_names(output: Path) -> tuple[str, ...]:
    """Return names inside a mount point that are not part of the output; none for other folders."""
    hidden = (hidden_folder(output, "partial").name, hidden_folder(output, "calibration").name)
    return (*hidden, "lost+found") if is_mount_point(output) else ()  # lost+found is the file system's
