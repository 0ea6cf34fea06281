"""``bundle.json``: its schema, and the names of a bundle's files.

Exporter and runtime share this module. :mod:`fusion_edge.runtime.bundle.reader` reads a bundle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fusion_edge.runtime.bundle.config import MINIMUM_QUESTION, FusionConfig
from fusion_edge.runtime.bundle.files import FileEntry
from fusion_edge.runtime.bundle.graphs import TensorSpec, cache_specs, cache_token_bytes, has_per_token_scales

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
EMBEDDINGS = "embeddings.data"
QUANTIZATION = "quantization.json"
TARGETS = ("cpu", "cuda", "tensorrt")
PRECISIONS = ("int4", "int8", "nf4", "fp16", "fp32")
FLOATS = {"fp16": "float16", "fp32": "float32"}
"""numpy dtype names of unquantized token tables, by kind."""


@dataclass(frozen=True)
class EmbeddingTable:
    """Layout of the token table ``[vocab_size, hidden_size]`` in ``embeddings.data``."""

    kind: str
    """``fp32``, ``fp16`` or ``int8`` (uint8 with zero point 128 and one float16 scale per group)."""
    group_size: int
    """Columns per scale; 0 for floats."""
    values_offset: int
    """Bytes."""
    scales_offset: int
    """Bytes."""

    def parts(self, rows: int, columns: int) -> tuple[TablePart, ...]:
        """Return the values, then the scales if any. Raise ``ValueError`` for an unknown kind or group size."""
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
    """An array in ``embeddings.data``."""

    dtype: str
    """numpy dtype name."""
    offset: int
    """Bytes."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of ``bundle.json``."""

    schema_version: int
    producer: str
    """Program and version that wrote the bundle."""
    source: str
    """Name of the checkpoint."""
    target: str
    """One of :data:`TARGETS`."""
    precision: str
    """One of :data:`PRECISIONS`."""
    max_context: int
    """Size of the KV cache in tokens, prompt and answer together."""
    query_lengths: tuple[int, ...]
    """Offered query lengths, the default first."""
    image_side: int
    """Side of the grid of image tokens; less than the vision grid in FUSION-L."""
    activations: str
    """numpy dtype name of the tensors between graphs."""
    cache: str
    """numpy dtype name of the KV cache."""
    accuracy_level: int
    """``accuracy_level`` attribute of ``MatMulNBits`` in every quantized linear."""
    model: FusionConfig
    embedding: EmbeddingTable
    graphs: Mapping[str, Mapping[str, Any]]
    """By graph name: ``inputs`` and ``outputs``, lists of name, dtype and shape."""
    weights: Mapping[str, str]
    """Format by weight name, such as ``int4:128``."""
    files: tuple[FileEntry, ...]

    @property
    def minimum_context(self) -> int:
        """Tokens of an image, the longest query and a short question."""
        return self.image_side**2 + max(self.query_lengths) + MINIMUM_QUESTION

    @property
    def has_per_token_scales(self) -> bool:
        """Whether the KV cache has a scale for each token and head (:func:`.graphs.has_per_token_scales`)."""
        return has_per_token_scales(self.target, self.cache)

    @property
    def cache_specs(self) -> list[TensorSpec]:
        """Tensors of the KV cache."""
        return cache_specs(self.model, self.target, self.cache)

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of a token in the KV cache."""
        return cache_token_bytes(self.model, self.target, self.cache)

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size for entry in self.files)

    def to_text(self) -> str:
        """Return the text of ``bundle.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def producer() -> str:
    """Return this program's name and version."""
    return f"fusion-edge {version('fusion-edge')}"


def graph_file(name: str) -> str:
    """Return the file name of a graph."""
    return f"{name}.onnx"


def data_file(name: str) -> str:
    """Return the file name of a graph's weights."""
    return f"{name}.data"
