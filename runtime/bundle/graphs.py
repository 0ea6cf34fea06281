"""Inputs and outputs of the three graphs of a bundle: names, dtypes and shapes.

The exporter writes them, ``bundle.json`` lists them, the backends feed them. Symbolic dimensions: ``crops``,
``text`` (tokens), ``latents`` (q), ``questions``, ``positions`` (tokens), ``capacity`` of the KV cache, ``slots`` of it
that attention reads (TensorRT), ``prefix`` of it that a prompt reads (TensorRT, int8), ``side`` (sqrt q) and rows of
pooling cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE, FusionConfig

VISION_ENCODER = "vision_encoder"
ALIGNMENT_DECODER = "alignment_decoder"
LLM = "llm"

ADDRESS_ALIGNMENT = 256
"""Bytes. TensorRT requires it of tensors (``IExecutionContext::setTensorAddress``) and of scratch memory."""

Dimension = int | str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output; ``dtype`` is a numpy dtype name."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


def split_dimension(dimension: str) -> tuple[str, int]:
    """Split a symbolic dimension: ``text`` is ``text`` and 0, ``text+729`` is ``text`` and 729.

    Values between the partitions of a graph have such sums. Raises :class:`ValueError` for another text.
    """
    name, plus, added = dimension.partition("+")
    return name, int(added) if plus else 0


def sized(dimensions: Iterable[Dimension], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape with the symbolic dimensions replaced by ``sizes``."""
    return tuple(_size(dimension, sizes) if isinstance(dimension, str) else dimension for dimension in dimensions)


def _size(dimension: str, sizes: Mapping[str, int]) -> int:
    name, added = split_dimension(dimension)
    return sizes[name] + added


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of a graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Return inputs and outputs as in ``bundle.json``."""
        return {
            side: [{"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in tensors]
            for side, tensors in (("inputs", self.inputs), ("outputs", self.outputs))
        }


def graph_specs(
    config: FusionConfig, target: str, activations: str, cache: str
) -> tuple[GraphSpec, GraphSpec, GraphSpec]:
    """Return vision encoder, alignment decoder and LLM; ``activations`` and ``cache`` are numpy dtype names."""
    hidden, patches = config.language.hidden_size, config.vision.patches
    features = ("crops", patches, hidden)
    vision = GraphSpec(
        VISION_ENCODER,
        (
            TensorSpec("pixel_values", activations, ("crops", 3, IMAGE_SIZE, IMAGE_SIZE)),
            TensorSpec("text_embeds", activations, ("crops", "text", hidden)),
            TensorSpec("text_mask", "int32", ("crops", "text")),
        ),
        (TensorSpec("features", activations, features),),
    )
    pairs = TensorSpec("keys", activations, _context(config)), TensorSpec("values", activations, _context(config))
    alignment = GraphSpec(
        ALIGNMENT_DECODER,
        (
            TensorSpec("features", activations, (GLOBAL_CROPS, patches, hidden)),
            TensorSpec("latent_cells", "int64", ("side", "latent_rows")),
            TensorSpec("context_cells", "int64", ("context_side", "context_rows")),
        ),
        (TensorSpec("latents", activations, (1, "latents", hidden)), *pairs),
    )
    return vision, alignment, _llm(config, target, activations, cache, pairs)


def _context(config: FusionConfig) -> tuple[Dimension, ...]:
    alignment = config.alignment
    return alignment.layers, "latents", alignment.window_size**2, config.language.hidden_size


def _llm(
    config: FusionConfig, target: str, activations: str, cache: str, pairs: tuple[TensorSpec, TensorSpec]
) -> GraphSpec:
    language = config.language
    cached = cache_specs(config, target, cache)
    has_rows = has_per_token_scales(target, cache)
    read = ("slots", "prefix") if has_rows else ("past",)
    past = [TensorSpec(f"{way}.{spec.name}", spec.dtype, _tokens(spec, way)) for way in read for spec in cached]
    written = "new" if has_rows else "present"
    present = [TensorSpec(f"{written}.{spec.name}", spec.dtype, _tokens(spec, "positions")) for spec in cached]
    if has_rows:
        places = [
            TensorSpec("positions", "int64", (1, "positions")),
            TensorSpec("slots", "int64", ("slots",)),
            TensorSpec("prefix", "int64", ("prefix",)),
        ]
    elif target == "tensorrt":
        places = [
            TensorSpec("positions", "int64", (1, "positions")),
            TensorSpec("write_index", "int64", (1,)),
            TensorSpec("slots", "int64", ("slots",)),
        ]
    else:
        places = [TensorSpec("last_position", "int32", (1,)), TensorSpec("total_length", "int32", ())]
    if cache == "int8" and not has_rows:
        places.append(TensorSpec("is_prefill", "bool", ()))
    inputs = (
        TensorSpec("embeddings", activations, (1, "positions", language.hidden_size)),
        TensorSpec("latent_positions", "int64", ("questions", "latents")),
        TensorSpec("question_positions", "int64", ("questions",)),
        *pairs,
        *places,
        *past,
    )
    return GraphSpec(LLM, inputs, (TensorSpec("logits", "float32", (1, language.vocab_size)), *present))


def _tokens(spec: TensorSpec, name: str) -> tuple[Dimension, ...]:
    """Return the shape of a tensor of the cache, with ``name`` for the dimension ``tokens``, if it has that."""
    return tuple(name if size == "tokens" else size for size in spec.shape)


def has_per_token_scales(target: str, cache: str) -> bool:
    """Return whether the KV cache has a scale for each token and head, so it is read only: the int8 one of TensorRT.

    Graphs return the new tokens' rows, which the backend stores.
    Inputs ``slots.{name}`` and ``prefix.{name}`` are the cache, for decode steps and for prompts; ``new.{name}`` are
    the rows. ``slots`` and ``prefix`` are the positions of the tokens in the cache. A decode step attends to slots
    with a smaller position than its own, so a slot that is not in use has a larger one.
    """
    return target == "tensorrt" and cache == "int8"


def cache_specs(config: FusionConfig, target: str, cache: str) -> list[TensorSpec]:
    """Return the tensors of the KV cache: keys and values layer by layer, and the scales of an int8 cache.

    The input ``past.{name}`` and the output ``present.{name}`` share their memory, except in a cache with
    per-token scales (:func:`has_per_token_scales`): one for each token and head.
    """
    language = config.language
    shape: tuple[Dimension, ...] = (1, language.kv_heads, "capacity", language.head_dim)
    scales: tuple[Dimension, ...] = (1, language.kv_heads, 1, language.head_dim)
    dtype = "float32"
    if has_per_token_scales(target, cache):
        shape, scales = ("tokens", language.kv_heads, language.head_dim), ("tokens", language.kv_heads)
        dtype = "float16"
    specs = []
    for layer in range(language.layers):
        specs += [TensorSpec(f"{layer}.{part}", cache, shape) for part in ("key", "value")]
        if cache == "int8":
            specs += [TensorSpec(f"{layer}.{part}_scale", dtype, scales) for part in ("key", "value")]
    return specs


def token_alignment(specs: Iterable[TensorSpec]) -> int:
    """Return the tokens after which every tensor of a cache with per-token scales, ``specs``, has an aligned address.

    TensorRT writes the rows of a prompt at such an address (:data:`ADDRESS_ALIGNMENT`).
    """
    return math.lcm(*(ADDRESS_ALIGNMENT // math.gcd(ADDRESS_ALIGNMENT, row_bytes(spec)) for spec in specs))


def cache_slots(specs: Iterable[TensorSpec], max_context: int) -> int:
    """Return the slots of such a cache for ``max_context`` tokens and the unused ones in front of a prompt."""
    step = token_alignment(specs)
    return (-(-max_context // step) + 1) * step


def row_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a token in a tensor of the cache."""
    return math.prod(size for size in spec.shape if isinstance(size, int)) * np.dtype(spec.dtype).itemsize


def cache_token_bytes(config: FusionConfig, target: str, cache: str) -> int:
    """Return the bytes of a token in the KV cache, with its scales if tokens have their own."""
    specs = cache_specs(config, target, cache)
    return sum(row_bytes(spec) for spec in specs if not all(isinstance(size, int) for size in spec.shape))
