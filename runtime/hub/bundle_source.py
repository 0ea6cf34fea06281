"""Find a bundle: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.hub.client import is_hub_id
from fusion_edge.runtime.hub.download import download_bundle


@dataclass(frozen=True)
class BundleSource:
    """Where a bundle comes from."""

    folder: str
    hub_id: str = ""
    """Empty for a local folder."""
    commit: str = ""
    unreachable: str = ""
    """Why a newer commit could not be looked up or downloaded; empty if it was, or need not be."""

    def __str__(self) -> str:
        """Describe the source, such as ``org/name at commit 0123456789ab, in FOLDER``."""
        if not self.hub_id:
            return f"local folder {self.folder}"
        return f"{self.hub_id} at commit {self.commit[:12]}, in {self.folder}"


def find_bundle(source: str | os.PathLike[str], revision: str | None = None) -> BundleSource:
    """Return the folder of a bundle; download it first if ``source`` is a hub id.

    Args:
        source: A folder, or a hub id ``org/name``. A folder of that name wins. A path object is always a folder.
        revision: Branch, tag or commit on the hub. None is the default branch.

    Raises:
        UsageError: An argument has a wrong type, or ``revision`` is given with a local folder.
        FusionError: The hub cannot provide the bundle.
    """
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not isinstance(path, str):
        raise UsageError(f"The bundle is of type {type(source).__name__}; expected the path of a folder or a hub id.")
    if not path:  # an unset variable of a script; pathlib would read it as the current folder
        raise UsageError("The bundle's path is empty; expected the path of a folder, or a hub id such as org/name.")
    if revision is not None and not isinstance(revision, str):
        raise UsageError(f"The revision is of type {type(revision).__name__}; expected a branch, tag or commit.")
    if re.match(r"https?://", path):
        raise FusionError(f"{path} is a URL: pass its hub id, org/name, or the folder of a downloaded bundle.")
    if isinstance(source, str) and is_hub_id(path) and not os.path.lexists(path):
        snapshot = download_bundle(path, revision)
        return BundleSource(str(snapshot.folder), path, snapshot.commit, snapshot.unreachable)
    if revision is not None:
        raise UsageError(
            f"The revision {revision} does not apply to the local folder {Path(path)}: leave it out, or pass a hub id "
            "such as org/name."
        )
    return BundleSource(path)
