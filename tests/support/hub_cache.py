"""A bundle in the layout of the hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from fusion_edge.runtime.bundle.files import digest


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
