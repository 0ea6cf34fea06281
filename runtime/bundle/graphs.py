"""Inputs and outputs of the three graphs of a bundle: names, dtypes and shapes.

The exporter writes them, ``bundle.json`` lists them, the backends feed them. Symbolic dimensions: ``crops``,
``text`` (tokens), ``latents`` (q), ``questions``, ``positions`` (tokens), ``capacity`` of the KV cache, ``slots`` of it
that attention reads (TensorRT), ``side`` (sqrt q) and rows of pooling cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE, FusionConfig

VISION_ENCODER = "vision_encoder"
ALIGNMENT_DECODER = "alignment_decoder"
LLM = "llm"

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
    cached = cache_specs(config, cache)
    past = [TensorSpec(f"past.{spec.name}", spec.dtype, spec.shape) for spec in cached]
    present = [TensorSpec(f"present.{spec.name}", spec.dtype, spec.shape) for spec in cached]
    if target == "tensorrt":
        places = [
            TensorSpec("positions", "int64", (1, "positions")),
            TensorSpec("write_index", "int64", (1,)),
            TensorSpec("slots", "int64", ("slots",)),
        ]
    else:
        places = [TensorSpec("last_position", "int32", (1,)), TensorSpec("total_length", "int32", ())]
    if cache == "int8":
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


def cache_specs(config: FusionConfig, cache: str) -> list[TensorSpec]:
    """Return the tensors of the KV cache: keys and values layer by layer, and the scales of an int8 cache.

    The input ``past.{name}`` and the output ``present.{name}`` share their memory.
    """
    language = config.language
    shape = (1, language.kv_heads, "capacity", language.head_dim)
    channels = (1, language.kv_heads, 1, language.head_dim)
    specs = []
    for layer in range(language.layers):
        specs += [TensorSpec(f"{layer}.{part}", cache, shape) for part in ("key", "value")]
        if cache == "int8":
            specs += [TensorSpec(f"{layer}.{part}_scale", "float32", channels) for part in ("key", "value")]
    return specs
