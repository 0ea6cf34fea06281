"""Estimate of the GPU memory that engines need, made before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, FusionConfig
from fusion_edge.runtime.bundle.engine_manifest import Engine, Engines
from fusion_edge.runtime.bundle.image_memory import longest_prefix
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.errors import DeviceError

FLOAT16_BYTES = 2
RUNTIME_BYTES = 350_000_000
"""CUDA context and TensorRT's own memory. An assumption, not a measurement."""


class DeviceMemoryError(DeviceError):
    """The device has too little free memory for the engines; other programs may use it."""


def activation_bytes(config: FusionConfig, max_context: int) -> int:
    """Estimate the activations of the largest run with fused attention: four crops, or a full prompt."""
    vision, language = config.vision, config.language
    tower = GLOBAL_CROPS * vision.patches * (6 * vision.width + 2 * vision.mlp_width)
    return FLOAT16_BYTES * max(tower, max_context * (3 * language.hidden_size + 4 * language.mlp_width))


def prompt_cache_bytes(manifest: Manifest, max_context: int) -> int:
    """Return the bytes of one layer's dequantized keys and values, which a prompt with an int8 cache reads.

    TensorRT reserves memory for the largest prefix and the largest prompt at once.
    """
    if not manifest.has_per_token_scales:
        return 0
    language, tokens = manifest.model.language, longest_prefix(manifest, max_context) + max_context
    return 2 * FLOAT16_BYTES * language.kv_heads * language.head_dim * tokens


def tensor_bytes(engines: Iterable[Engine]) -> int:
    """Return the bytes of all inputs and outputs at their largest.

    The KV cache counts once: what engines read and what they write lies in one memory.
    """
    sizes: dict[str, int] = {}
    for engine in engines:
        largest = engine.largest_shapes
        for tensor in engine.tensors:
            size = math.prod(largest[tensor["name"]]) * np.dtype(tensor["dtype"]).itemsize
            name = re.sub(r"^(present|slots|prefix|new)\.", "past.", tensor["name"])
            sizes[name] = max(sizes.get(name, 0), size)
    return sum(sizes.values())


def needed_bytes(manifest: Manifest, engines: Engines, max_context: int) -> int:
    """Estimate the device memory of the engines, or an upper bound for engines rebuilt with a smaller context."""
    tensors = tensor_bytes(engine for parts in engines.engines.values() for engine in parts)
    activations = activation_bytes(manifest.model, max_context) + prompt_cache_bytes(manifest, max_context)
    saved = manifest.cache_token_bytes * (engines.max_context - max_context)
    return RUNTIME_BYTES + engines.size + tensors - saved + activations


def check_device_memory(manifest: Manifest, engines: Engines, cuda: Cuda) -> None:
    """Raise :class:`DeviceMemoryError` with the context that would fit if the device has too little free memory."""
    context = engines.max_context
    needed = needed_bytes(manifest, engines, context)
    free, total = cuda.memory()
    if needed <= free:
        return
    smaller = range(context - 64, manifest.minimum_context - 1, -64)
    fits = next((tokens for tokens in smaller if needed_bytes(manifest, engines, tokens) <= free), None)
    if fits is not None:
        remedy = f"build with fusion-build --max-context {fits}, which fits"
    else:
        cache = "" if manifest.cache == "int8" else "--kv-cache int8, "
        remedy = f"export with --int4, {cache}fewer --image-tokens or a smaller --query-len (no --max-context fits)"
    raise DeviceMemoryError(
        f"The engines need about {needed / 1e9:.2f} GB on the device ({engines.size / 1e9:.2f} GB of weights, "
        f"{manifest.cache_token_bytes * context / 1e9:.2f} GB of KV cache for {context} tokens); {free / 1e9:.2f} of "
        f"{total / 1e9:.2f} GB are free. Close other programs, or {remedy}."
    )
