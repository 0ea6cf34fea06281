"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion_edge.export.folder_lock import locked
from fusion_edge.runtime.errors import FusionError


@contextmanager
def partial_folder(output: Path, what: str) -> Iterator[Path]:
    """A temporary folder beside ``output``, renamed to it at the end and removed on any error.

    What a killed process left is removed by the next one; the lock tells it from one that is still running. ``what``
    names that, such as "export". Raises :class:`FusionError` if another is writing, or the disk is full.
    """
    folder = output.parent / f".{output.name}.partial"
    replaced = output.parent / f".{output.name}.replaced"
    try:
        with _locked(folder, f"Another {what} is writing {output}; wait for it or choose another output."):
            _put_back(replaced, output)  # a process was killed between the two renames below
            for left in folder.iterdir():
                left.unlink()
            yield folder
            try:
                if output.exists():
                    output.rename(replaced)
                folder.rename(output)
            finally:
                _put_back(replaced, output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FusionError(f"The disk of {output.parent} is full; free some space and {what} again.") from None
        raise FusionError(f"Cannot write {output}: {error.strerror}.") from None


def _put_back(replaced: Path, output: Path) -> None:
    """The replaced folder returns if nothing has taken its place, and goes if something has."""
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold ``folder``, made if absent, which an error removes."""
    with locked(folder, busy):
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
