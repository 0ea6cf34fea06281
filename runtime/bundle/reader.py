"""Open a bundle: read ``bundle.json``, check its values, its files and its graphs.

The runtime reads only files that the manifest lists. All lie inside the folder, or are links of the hub cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusion_edge.runtime.bundle.files import SNAPSHOTS, check_digest, check_file, is_snapshot
from fusion_edge.runtime.bundle.graph_validation import check_graph
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.manifest import MANIFEST, SCHEMA_VERSION, Manifest, data_file, graph_file
from fusion_edge.runtime.bundle.manifest_validation import check_values
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import FusionError

REMEDY = "Copy or export the bundle again."
SNAPSHOT_REMEDY = "Delete that file, and load the bundle by its hub id: it is downloaded again."
ALWAYS_VERIFIED_BYTES = 64 << 20
"""Opening a bundle verifies the checksums of files up to this size."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Return the path of a listed file. Raise :class:`FusionError` if the manifest does not list it."""
        if all(entry.path != name for entry in self.manifest.files):
            raise FusionError(f"{self.folder / MANIFEST} lists no {name}; export the bundle again.")
        return self.folder / name


def open_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle: the manifest, presence and size of every file, checksums of small files, the graphs.

    Raises :class:`FusionError` with the fault and the remedy.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    remedy = _remedy(folder)
    for entry in manifest.files:
        check_file(folder, entry, MANIFEST, remedy)
        if entry.size <= ALWAYS_VERIFIED_BYTES:
            check_digest(folder, entry, MANIFEST, remedy)
    bundle = Bundle(folder, manifest)
    _check_graphs(bundle)
    return bundle


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``bundle.json`` of a folder. Raise :class:`FusionError` with the fault and the remedy."""
    path = folder / MANIFEST
    remedy = "Pass the folder that fusion-export wrote."
    if os.fsencode(folder) != str(folder).encode("utf-8", "replace"):
        raise FusionError(
            f"The bundle's path {folder} is not UTF-8, and ONNX Runtime opens no other paths; rename the folder."
        )
    if not os.path.isdir(folder):
        raise FusionError(f"{folder} is not a folder; expected a bundle. {remedy}")
    try:
        data = read_json(path)
    except FileNotFoundError:
        if snapshot := next((folder / SNAPSHOTS).glob(f"*/{MANIFEST}"), None):
            remedy = f"It is a repository in the hub cache: pass its snapshot {snapshot.parent}."
        raise FusionError(f"{folder} is not a bundle: it has no {MANIFEST}. {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"{path} cannot be read ({error}); export the bundle again.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise FusionError(
            f"{folder} has bundle schema {str(version)[:40]}, newer than {SCHEMA_VERSION}, which this fusion-edge "
            "reads; upgrade fusion-edge."
        )
    try:
        manifest = from_json(Manifest, data)
        check_values(manifest)
    except (ValueError, RecursionError) as error:
        raise FusionError(
            f"{path} does not follow bundle schema {SCHEMA_VERSION} ({error}); export the bundle again."
        ) from None
    return manifest


def verify(bundle: Bundle, advance: Callable[[int], None] = lambda _: None) -> None:
    """Check the SHA-256 of every file. ``advance`` receives the bytes read. Raises :class:`FusionError`."""
    remedy = _remedy(bundle.folder)
    for entry in bundle.manifest.files:
        check_digest(bundle.folder, entry, MANIFEST, remedy, advance)


def _remedy(folder: Path) -> str:
    return SNAPSHOT_REMEDY if is_snapshot(folder) else REMEDY


def _check_graphs(bundle: Bundle) -> None:
    """Raise :class:`FusionError` for a graph with anything that fusion-export does not write."""
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    for name in bundle.manifest.graphs:
        graph, data = graph_file(name), data_file(name)
        if graph not in sizes or data not in sizes:
            continue  # loading the graph reports this
        path = bundle.folder / graph
        try:
            check_graph(path, data, sizes[data])
        except (OSError, ValueError) as error:
            raise FusionError(
                f"{path} is not a graph that fusion-export wrote: {error}; do not use it, export the bundle again."
            ) from None
