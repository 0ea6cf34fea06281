"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fusion_edge.export.bundle.files import exchange, flush_folder, write_file
from fusion_edge.export.bundle.folder_lock import OPENED, Owns, delete, entries, is_at, locked, matches, remove
from fusion_edge.export.bundle.mount_point import hidden_folder, hidden_in, workplace
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system import signals

_REPLACED = "replaced.json"
# In a partial folder whose files are moving into a mount point: the manifest of what was there, or nothing.


@dataclass(frozen=True)
class Content:
    """What a command writes into a folder, and so may delete there."""

    what: str
    """Names the command in messages, such as "export"."""
    files: tuple[str, ...]
    """Patterns of names."""
    manifest: str
    """The file that is written last."""
    listed: Callable[[Path], Collection[str]] | None = None
    """The files that a manifest lists: no others were written with it. None: all that match were."""
    additions: tuple[str, ...] = ()
    """Patterns of what other commands put there later; folders' end with a slash."""

    def is_partial(self, path: str) -> bool:
        """Whether ``path`` may be in a partial folder: of what is being written, or of what was exchanged for it."""
        return matches(path, *self.files, self.manifest, f".{self.manifest}.*", _REPLACED, *self.additions)

    def written_with(self, manifest: Path) -> Owns:
        """Whether paths were written with this manifest, itself among them."""
        listed = None if self.listed is None else self.listed(manifest)
        return lambda path: path == self.manifest or (matches(path, *self.files) and (listed is None or path in listed))

    def owned(self, manifest: Path) -> Owns:
        """Whether paths were written with this manifest or added later."""
        written = self.written_with(manifest)
        return lambda path: written(path) or matches(path, *self.additions)


@contextmanager
def partial_folder(output: Path, content: Content, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary folder beside ``output``, renamed to it at the end and removed on any error or signal.

    If ``output`` is a mount point the folder is in it, and its files are moved at the end, the manifest last. ``check``
    raises if ``output`` may not be replaced. What a killed process left is put in order first.

    Raises :class:`FusionError` if another process is writing ``output``, if it or what was left holds anything that
    commands did not write, or if the disk is full.
    """
    folder = hidden_folder(output, "partial")
    busy = f"Another {content.what} is writing {output}; wait for it or choose another output."
    try:
        if os.path.lexists(folder):
            _end_the_killed(folder, output, content, busy)
        with ExitStack() as stack:
            with signals.held():
                descriptor = stack.enter_context(locked(folder, busy, is_new=True))
                stack.callback(_discard, descriptor, folder, content)
            _put_back(output, content, busy)
            check()
            yield folder
            with signals.held():
                check()
                if not is_at(descriptor, folder):
                    raise FusionError(busy)
                if folder.parent == output:
                    _move_in(folder, output, content)
                else:
                    _rename(folder, output, content)
    except OSError as error:
        raise FusionError(_reason(error, output, content.what)) from None


def _reason(error: OSError, output: Path, what: str) -> str:
    place = workplace(output)
    if error.errno == errno.ENOSPC:
        return f"The disk of {place} is full; free some space and {what} again."
    if error.errno == errno.EDQUOT:
        return f"Your quota on the disk of {place} is used up; free some space and {what} again."
    if error.errno == errno.EFBIG:
        return f"The file system of {place} takes no files as large as these (FAT32: 4 GB); choose an output elsewhere."
    if error.errno in (errno.EBUSY, errno.EXDEV):
        return f"Cannot write {output}, which is in use or a mount point; choose an output inside it."
    return f"Cannot write {output}: {error.strerror}."


def _discard(descriptor: int, folder: Path, content: Content) -> None:
    """Remove the partial folder, if it has not become the output; nothing that went wrong before is hidden."""
    with signals.held(), suppress(OSError, FusionError):
        if is_at(descriptor, folder) and not _is_moving(folder, content):
            remove(descriptor, folder, content.is_partial)


def _is_moving(folder: Path, content: Content) -> bool:
    """Whether the files of a whole folder are on their way into a mount point, which has no bundle meanwhile."""
    return os.path.lexists(folder / _REPLACED) and os.path.lexists(folder / content.manifest)


def _end_the_killed(folder: Path, output: Path, content: Content, busy: str) -> None:
    """Remove the partial folder of a killed process, which may have begun to move its files into a mount point."""
    with signals.held(), locked(folder, busy) as descriptor:
        if _is_moving(folder, content):
            _move_in(folder, output, content)
        remove(descriptor, folder, content.is_partial)


# A folder beside the output ---------------------------------------------------------------------------------------


def _put_back(output: Path, content: Content, busy: str) -> None:
    """What a killed process was replacing returns if nothing has taken its place, and goes if something has."""
    replaced = hidden_folder(output, "replaced")
    if not os.path.lexists(replaced):
        return
    owns = content.owned(replaced / content.manifest)
    with signals.held(), locked(replaced, busy) as descriptor:
        if entries(descriptor, owns, replaced) and not os.path.lexists(output):
            os.rename(replaced, output)
        else:
            remove(descriptor, replaced, owns, content.manifest)


def _rename(folder: Path, output: Path, content: Content) -> None:
    """The finished folder takes the output's place."""
    replaced, owns = hidden_folder(output, "replaced"), content.owned(output / content.manifest)
    if not os.path.lexists(output) or not os.listdir(output):
        os.rename(folder, output)
        flush_folder(output.parent)
        return
    old = os.open(output, OPENED)
    try:
        entries(old, owns, output)
        try:
            replaced = _exchange(folder, output, replaced)
        except OSError as error:
            if error.errno != errno.EXDEV or not os.path.lexists(output / content.manifest):
                raise
            _move_in(folder, output, content)  # folders of an image's layers cannot be renamed, their files can be
            return
        flush_folder(output.parent)
        remove(old, replaced, owns, content.manifest)
    finally:
        os.close(old)


def _exchange(folder: Path, output: Path, replaced: Path) -> Path:
    """Where the output's old content is after it has given way to the folder's."""
    if exchange(folder, output):  # so there is a bundle at any time
        return folder
    os.rename(output, replaced)
    try:
        os.rename(folder, output)
    except BaseException:
        os.rename(replaced, output)
        raise
    return replaced


# A folder whose files move into the output ---------------------------------------------------------------------------


def _move_in(folder: Path, output: Path, content: Content) -> None:
    """The finished folder's files take the place of those in the output, which has no manifest meanwhile.

    After a kill it can be done again.
    """
    current, new, replaced = output / content.manifest, folder / content.manifest, folder / _REPLACED
    old = content.owned(current if os.path.lexists(current) else replaced)
    written = content.written_with(new)
    place = os.open(output, OPENED)
    try:
        inside = entries(place, lambda path: old(path) or written(path), output, hidden_in(output))
        if os.path.lexists(current):
            os.rename(current, replaced)
        elif not os.path.lexists(replaced):
            write_file(replaced, b"")
        delete(place, [path for path in inside if not written(path)])
    finally:
        os.close(place)
    for name in os.listdir(folder):
        if name not in (content.manifest, _REPLACED):
            os.rename(folder / name, output / name)
    flush_folder(output)
    os.rename(new, current)
    flush_folder(output)
    os.unlink(replaced)
