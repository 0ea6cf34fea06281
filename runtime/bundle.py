"""The bundle: a folder whose ``bundle.json`` lists everything in it. Its schema is defined here and nowhere else.

Nothing is read that the manifest does not list, nothing outside the folder.
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

from fusion_edge.runtime.config import IMAGE_SIZE, MINIMUM_QUESTION, FusionConfig
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.graphs import graph_specs
from fusion_edge.runtime.prompts import TEMPLATES
from fusion_edge.runtime.schema import from_json

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
EMBEDDINGS = "embeddings.data"
QUANTIZATION = "quantization.json"
CHUNK_BYTES = 1 << 20
AGAIN = "Copy or export the bundle again."
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
    """Read and check a bundle: its manifest, the presence and size of every file, checksums of small ones.

    Raises :class:`FusionError` naming what is wrong and what to do.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for entry in manifest.files:
        check_file(folder, entry, MANIFEST, AGAIN)
        if entry.size <= ALWAYS_VERIFIED_BYTES:
            check_digest(folder, entry, MANIFEST, AGAIN)
    return Bundle(folder, manifest)


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
    if not os.path.isdir(folder):
        raise FusionError(f"{folder} is not a folder; expected a bundle. {remedy}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FusionError(f"{folder} is not a bundle: it has no {MANIFEST}. {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"{path} cannot be read ({error}); export the bundle again.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise FusionError(
            f"{folder} has bundle schema {version}, newer than {SCHEMA_VERSION}, which this fusion-edge reads; "
            "upgrade fusion-edge (pip install --upgrade fusion-edge)."
        )
    try:
        manifest = from_json(Manifest, data)
        _check_values(manifest)
    except ValueError as error:
        raise FusionError(
            f"{path} does not follow bundle schema {SCHEMA_VERSION} ({error}); export the bundle again."
        ) from None
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raise ``ValueError`` for values of the right types that contradict each other."""
    model, vision = manifest.model, manifest.model.vision
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {manifest.schema_version}")
    if model.template not in TEMPLATES:
        raise ValueError(f"model.template is {model.template!r}, not {' or '.join(TEMPLATES)}")
    if not 1 <= vision.patch_size <= IMAGE_SIZE:
        raise ValueError(f"model.vision.patch_size is {vision.patch_size}")
    if not 1 <= manifest.image_side <= vision.grid:
        raise ValueError(f"image_side is {manifest.image_side}, the vision grid's is {vision.grid}")
    if not 1 <= manifest.max_context <= model.max_length:
        raise ValueError(f"max_context is {manifest.max_context}, the model's max_length is {model.max_length}")
    if not manifest.query_lengths or not set(manifest.query_lengths) <= set(model.alignment.query_lengths):
        raise ValueError(f"query_lengths are {list(manifest.query_lengths)}, not among the model's")
    if model.language.layers > len(manifest.weights):
        raise ValueError(f"model.language.layers is {model.language.layers}, more than there are weights")
    for spec in graph_specs(model, manifest.target, manifest.activations, manifest.cache):
        if manifest.graphs.get(spec.name) != spec.to_json():
            raise ValueError(f"graphs.{spec.name} is not what the model's sizes ask for")


def check_file(folder: Path, entry: FileEntry, listed_in: str, remedy: str) -> None:
    """Raise :class:`FusionError` unless a listed file is inside ``folder`` and of its size."""
    relative = PurePosixPath(entry.path)
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file can have
        inside = False
    if relative.is_absolute() or ".." in relative.parts or not inside:
        raise FusionError(
            f"{folder / listed_in} lists {entry.path!r}, which leads outside its folder; do not use it."
        )
    if not os.path.isfile(path):
        raise FusionError(f"{path} is missing though {listed_in} lists it. {remedy}")
    if (size := path.stat().st_size) != entry.size:
        raise FusionError(f"{path} has {size} bytes; {listed_in} says {entry.size}. {remedy}")


def check_digest(
    folder: Path, entry: FileEntry, listed_in: str, remedy: str, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Raise :class:`FusionError` unless a listed file has the SHA-256 that it is listed with."""
    if digest(folder / entry.path, advance) != entry.sha256:
        raise FusionError(
            f"{folder / entry.path} has been altered: its SHA-256 is not the one in {listed_in}. {remedy}"
        )
