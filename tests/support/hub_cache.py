"""A bundle in the layout of the hub's cache, and what a repository holds beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from fusion_edge.runtime.bundle.files import digest

NOT_OF_THE_BUNDLE = {"README.md": b"---\nlicense: mit\n---\n", ".gitattributes": b"", "engines/x/llm.engine": b"code"}
"""Files of a repository that no bundle lists."""


def content(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def in_hub_cache(bundle: Path, root: Path, inside: str = "") -> Path:
    """Copy a bundle to the layout of ``snapshot_download``: ``blobs`` by content, and links in a snapshot."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd" / inside
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    up = "../" * len(snapshot.relative_to(root).parts)
    for file in bundle.iterdir():
        shutil.copy(file, blobs / digest(file))
        (snapshot / file.name).symlink_to(f"{up}blobs/{digest(file)}")
    return snapshot
