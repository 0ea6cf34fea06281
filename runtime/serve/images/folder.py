"""Pictures of one folder.

Each part of a path is opened relative to the folder before it, without following links, so nobody can exchange a
checked folder for a link between check and use.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote

from fusion_edge.runtime.serve.images.errors import ImageError, Reason

MAX_LENGTH = 4096
"""Characters of a path."""
MAX_DEPTH = 32
"""Parts of a path."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe would wait for its writer


def relative_parts(url: str, folder: Path) -> list[str]:
    """Return the parts of the path inside ``folder`` that a ``file:`` URL or a relative name means.

    A URL has the absolute path, ``file:///FOLDER/NAME``; a name is relative to the folder. Raises :class:`ImageError`.
    """
    if url[:5].lower() == "file:":
        if len(url) > 3 * MAX_LENGTH or url[5:8] != "///" or "?" in url or "#" in url:
            raise _invalid("a file: URL of another form than file:///FOLDER/NAME")
        try:
            path = unquote(url[7:], errors="strict")
        except UnicodeDecodeError:
            raise _invalid("percent-encoded, but not in UTF-8") from None
        prefix = f"{folder}/" if str(folder) != "/" else "/"
        if not path.startswith(prefix):
            raise ImageError(
                Reason.NOT_ALLOWED, "The file is not in the server's folder of pictures; send it as a data: URL."
            )
        name = path[len(prefix) :]
    else:
        name = url
    parts = name.split("/")
    if len(name) > MAX_LENGTH or len(parts) > MAX_DEPTH:
        raise _invalid(f"longer than {MAX_LENGTH} characters or {MAX_DEPTH} folders")
    if any(part in ("", ".", "..") for part in parts):
        raise _invalid("absolute or not normalized")
    if not name.isprintable():  # NUL, control characters, halves of surrogate pairs
        raise _invalid("not printable")
    return parts


def read_file(folder: Path, parts: list[str], max_bytes: int) -> bytes:
    """Return the bytes of a regular file inside ``folder``. Raises :class:`ImageError`."""
    try:
        descriptor = _open(folder, parts)
    except OSError:  # missing, a link, a folder without permission: the client learns no difference
        raise ImageError(
            Reason.NOT_ALLOWED, "The name is of no readable file in the server's folder of pictures, links excluded."
        ) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ImageError(Reason.NOT_ALLOWED, "The name is of a folder, pipe or device; expected a picture.")
    with open(descriptor, "rb") as file:
        data = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
        if status.st_size > max_bytes or len(data) > max_bytes:  # it may grow meanwhile
            raise ImageError(
                Reason.TOO_LARGE, f"The picture has more than {max_bytes} bytes, the limit; scale it down."
            )
        return data


def _open(folder: Path, parts: list[str]) -> int:
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the operator's own folder may be a link
    for part in parts[:-1]:
        try:
            inner = os.open(part, _FOLDER, dir_fd=at)
        finally:
            os.close(at)
        at = inner
    try:
        return os.open(parts[-1], _FILE, dir_fd=at)
    finally:
        os.close(at)


def _invalid(why: str) -> ImageError:
    return ImageError(
        Reason.INVALID_URL, f"The name is {why}; expected a path inside the server's folder, such as frames/1.jpg."
    )
