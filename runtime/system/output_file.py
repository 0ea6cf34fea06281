"""Output files, written atomically: complete, or as they were before."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from fusion_edge.runtime.errors import FusionError


def check_output_file(path: Path) -> None:
    """Raise :class:`FusionError` unless a file can be written or replaced at ``path``."""
    target = Path(os.path.realpath(path))
    if str(path) == "-":
        raise FusionError("- is not a file name; pass a path such as report.html.")
    if not target.parent.is_dir():
        raise FusionError(f"{path.parent} is not a folder; create it, or choose another file.")
    if target.exists() and not target.is_file():
        raise FusionError(f"{path} is not a regular file and is not replaced; choose another file.")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise FusionError(f"{path} is not writable; choose a file in a writable folder.")


def write_whole(path: Path, content: bytes | str) -> None:
    """Write or replace a file by a rename, so that no failure leaves it incomplete. Text becomes UTF-8.

    Raises :class:`FusionError` as :func:`check_output_file`, and :class:`OSError` with ``path`` as its file name.
    """
    check_output_file(path)
    target = Path(os.path.realpath(path))  # keeps a link
    partial = target.with_name(f".{target.name[:60]}.{secrets.token_hex(4)}")
    data = memoryview(content.encode() if isinstance(content, str) else content)
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        try:
            if target.exists():
                with suppress(OSError):  # a file system without permissions
                    os.fchmod(descriptor, target.stat().st_mode & 0o777)
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, target)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
