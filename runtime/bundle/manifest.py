"""The bundle: a folder whose ``bundle.json`` lists everything in it. Its schema is defined here and nowhere else.

Nothing is read that the manifest does not list, nothing outside the folder but what a hub's cache links to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from fusion_edge.runtime.bundle.config import MINIMUM_QUESTION, FusionConfig
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.manifest_values import check_values
from fusion_edge.runtime.bundle.onnx_file import check_graph
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import FusionError

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
EMBEDDINGS = "embeddings.data"
QUANTIZATION = "quantization.json"
CHUNK_BYTES = 1 << 20
SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""Folders of a repository in the hub's cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
AGAIN = "Copy or export the bundle again."
FLOATS = {"fp16": "float16", "fp32": "float32"}
"""numpy's names of the token table's types that are not quantized."""
ALWAYS_VERIFIED_BYTES = 64 << 20  # below this a file's checksum is checked whenever a bundle is opened


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle; ``path`` is relative, with forward slashes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class EmbeddingTable:
    """Where ``embeddings.data`` holds the token table: ``[vocab_size, hidden_size]``, offsets in bytes."""

    kind: str
    """fp32, fp16 or int8 (uint8 around 128, one float16 scale a group)."""
    group_size: int
    """Columns that share a scale; 0 for floats."""
    values_offset: int
    scales_offset: int

    def parts(self, rows: int, columns: int) -> tuple[TablePart, ...]:
        """Values, then scales if there are any. Raises ``ValueError`` for a kind or group size that there is not."""
        if self.kind in FLOATS and self.group_size == 0:
            return (TablePart(FLOATS[self.kind], self.values_offset, (rows, columns)),)
        if self.kind == "int8" and self.group_size > 0:
            groups = -(-columns // self.group_size)
            return (
                TablePart("uint8", self.values_offset, (rows, groups, self.group_size)),
                TablePart("float16", self.scales_offset, (rows, groups)),
            )
        raise ValueError(f"embedding is of the kind {self.kind[:40]!r} with groups of {self.group_size}")


@dataclass(frozen=True)
class TablePart:
    """An array in ``embeddings.data``; ``dtype`` is numpy's name of it, ``offset`` in bytes."""

    dtype: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of ``bundle.json``."""

    schema_version: int
    producer: str
    source: str
    """Name of the checkpoint that the bundle was made from."""
    target: str
    """``cpu``, ``cuda`` or ``tensorrt``."""
    precision: str
    max_context: int
    """Positions that fit in the KV cache: prompt and answer together."""
    query_lengths: tuple[int, ...]
    """Offered query lengths, the default first."""
    image_side: int
    """Side of the grid of image tokens (FUSION-L where it is less than the vision grid)."""
    activations: str
    """numpy dtype name of what flows between the graphs."""
    cache: str
    """numpy dtype name of the KV cache."""
    accuracy_level: int
    """MatMulNBits' attribute of every quantized linear."""
    model: FusionConfig
    embedding: EmbeddingTable
    graphs: Mapping[str, Mapping[str, Any]]
    """By graph name: ``inputs`` and ``outputs``, each a list of name, dtype and shape."""
    weights: Mapping[str, str]
    """Format of every weight, such as ``int4:128``."""
    files: tuple[FileEntry, ...]

    @property
    def least_context(self) -> int:
        """Positions of image tokens, the most latents, and a short question."""
        return self.image_side**2 + max(self.query_lengths) + MINIMUM_QUESTION

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size for entry in self.files)

    def to_text(self) -> str:
        """The text of ``bundle.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Path of a listed file. Raises :class:`FusionError` if the manifest does not list it."""
        if all(entry.path != name for entry in self.manifest.files):
            raise FusionError(f"{self.folder / MANIFEST} lists no {name}; export the bundle again.")
        return self.folder / name


def open_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle: its manifest, the presence and size of every file, checksums of small ones, its graphs.

    Raises :class:`FusionError` naming what is wrong and what to do.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for entry in manifest.files:
        check_file(folder, entry, MANIFEST, AGAIN)
        if entry.size <= ALWAYS_VERIFIED_BYTES:
            check_digest(folder, entry, MANIFEST, AGAIN)
    bundle = Bundle(folder, manifest)
    _check_graphs(bundle)
    return bundle


def verify(bundle: Bundle, advance: Callable[[int], None] = lambda _: None) -> None:
    """Check every file's SHA-256; ``advance`` is told the bytes read. Raises :class:`FusionError`."""
    for entry in bundle.manifest.files:
        check_digest(bundle.folder, entry, MANIFEST, AGAIN, advance)


def digest(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file as hexadecimal text."""
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            total.update(chunk)
            advance(len(chunk))
    return total.hexdigest()


def producer() -> str:
    """This program and its version, as what it writes names them."""
    return f"fusion-edge {version('fusion-edge')}"


def graph_file(name: str) -> str:
    """File name of a graph's model."""
    return f"{name}.onnx"


def data_file(name: str) -> str:
    """File name of a graph's weights."""
    return f"{name}.data"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    remedy = "Pass the folder that fusion-export wrote."
    if os.fsencode(folder) != str(folder).encode("utf-8", "replace"):
        raise FusionError(f"The bundle's path {folder} is not UTF-8; ONNX Runtime opens no other: rename the folder.")
    if not os.path.isdir(folder):
        raise FusionError(f"{folder} is not a folder; expected a bundle. {remedy}")
    try:
        data = read_json(path)
    except FileNotFoundError:
        if snapshot := next((folder / SNAPSHOTS).glob(f"*/{MANIFEST}"), None):
            remedy = f"It is a repository in the hub's cache: pass its snapshot {snapshot.parent}."
        raise FusionError(f"{folder} is not a bundle: it has no {MANIFEST}. {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"{path} cannot be read ({error}); export the bundle again.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise FusionError(
            f"{folder} has bundle schema {str(version)[:40]}, newer than {SCHEMA_VERSION}, which this fusion-edge "
            "reads; upgrade fusion-edge (pip install --upgrade fusion-edge)."
        )
    try:
        manifest = from_json(Manifest, data)
        if manifest.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {manifest.schema_version}")
        check_values(manifest, EMBEDDINGS)
    except (ValueError, RecursionError) as error:
        raise FusionError(
            f"{path} does not follow bundle schema {SCHEMA_VERSION} ({error}); export the bundle again."
        ) from None
    return manifest


def _check_graphs(bundle: Bundle) -> None:
    """Raise :class:`FusionError` for a graph that asks for more than fusion-export's do (``onnx_file.py``)."""
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    for name in bundle.manifest.graphs:
        graph, data = graph_file(name), data_file(name)
        if graph not in sizes or data not in sizes:
            continue  # which is an error where the graph is used
        path = bundle.folder / graph
        try:
            check_graph(path, data, sizes[data])
        except (OSError, ValueError) as error:
            raise FusionError(
                f"{path} is not a graph that fusion-export wrote: {error}; do not use it, export the bundle again."
            ) from None


def check_file(folder: Path, entry: FileEntry, listed_in: str, remedy: str) -> None:
    """Raise :class:`FusionError` unless a listed file is inside ``folder``, or its hub cache, and of its size."""
    relative = PurePosixPath(entry.path)
    path = folder / relative
    if relative.is_absolute() or ".." in relative.parts or not _is_inside(path, folder):
        raise FusionError(f"{folder / listed_in} lists {entry.path!r}, which leads outside its folder; do not use it.")
    if not os.path.isfile(path):
        raise FusionError(f"{path} is missing though {listed_in} lists it. {remedy}")
    if (size := path.stat().st_size) != entry.size:
        raise FusionError(f"{path} has {size} bytes; {listed_in} says {entry.size}. {remedy}")


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder, or is a link of the hub's cache.

    There ``snapshots/REVISION/NAME`` links to ``blobs/SHA`` of the same repository, whatever the size of the file. What
    protects it there is what protects it in any folder: its size and checksum in the manifest.
    """
    try:
        file, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file can have
        return False
    caches = (around.parent / BLOBS for around in root.parents if around.name == SNAPSHOTS)
    return file.is_relative_to(root) or any(file.is_relative_to(cache) for cache in caches)


def check_digest(
    folder: Path, entry: FileEntry, listed_in: str, remedy: str, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Raise :class:`FusionError` unless a listed file has the SHA-256 that it is listed with."""
    if digest(folder / entry.path, advance) != entry.sha256:
        raise FusionError(
            f"{folder / entry.path} has been altered: its SHA-256 is not the one in {listed_in}. {remedy}"
        )
