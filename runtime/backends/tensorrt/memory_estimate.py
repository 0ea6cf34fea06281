"""How much memory a bundle takes on a GPU with TensorRT, told before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, FusionConfig
from fusion_edge.runtime.bundle.engine_manifest import Engine, Engines
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.errors import DeviceError

HALF = 2  # bytes of a float16
RUNTIME_BYTES = 350_000_000
"""A CUDA context and TensorRT's own (an assumption: engines have not been run by us)."""


def activation_bytes(config: FusionConfig, max_context: int) -> int:
    """What the largest run holds between its tensors, with fused attention: four crops, or a full prompt."""
    vision, language = config.vision, config.language
    tower = GLOBAL_CROPS * vision.patches * (6 * vision.width + 2 * vision.mlp_width)
    return HALF * max(tower, max_context * (3 * language.hidden_size + 4 * language.mlp_width))


def cache_bytes(config: FusionConfig, max_context: int) -> int:
    """The KV cache in float16, all of which is reserved."""
    return HALF * config.language.cache_values * max_context


def tensor_bytes(engines: Iterable[Engine]) -> int:
    """Inputs and outputs at their largest, the KV cache once, which comes in and goes out in the same memory."""
    sizes: dict[str, int] = {}
    for engine in engines:
        largest = engine.largest_shapes
        for tensor in engine.tensors:
            size = math.prod(largest[tensor["name"]]) * np.dtype(tensor["dtype"]).itemsize
            name = tensor["name"].replace("present.", "past.")
            sizes[name] = max(sizes.get(name, 0), size)
    return sum(sizes.values())


def needed_bytes(config: FusionConfig, engines: Engines, max_context: int) -> int:
    """Of the device, for the engines as they are, or, a little too much, rebuilt for a smaller context."""
    tensors = tensor_bytes(engine for parts in engines.engines.values() for engine in parts)
    cache_saved = cache_bytes(config, engines.max_context - max_context)
    return RUNTIME_BYTES + engines.size + tensors - cache_saved + activation_bytes(config, max_context)


def check_device_memory(manifest: Manifest, engines: Engines, cuda: Cuda) -> None:
    """Raise :class:`DeviceError` if the device has too little free memory for the engines, with what would fit."""
    config, context = manifest.model, engines.max_context
    needed = needed_bytes(config, engines, context)
    free, total = cuda.memory()
    if needed <= free:
        return
    smaller = range(context - 64, manifest.minimum_context - 1, -64)
    fits = next((positions for positions in smaller if needed_bytes(config, engines, positions) <= free), None)
    if fits is not None:
        remedy = f"it fits with {fits} positions: fusion-build --max-context {fits}"
    else:
        remedy = "not with any --max-context: export with --int4, fewer --image-tokens or a smaller --query-len"
    raise DeviceError(
        f"The engines need about {needed / 1e9:.2f} GB on the device ({engines.size / 1e9:.2f} GB of weights, "
        f"{cache_bytes(config, context) / 1e9:.2f} GB of KV cache for {context} positions); {free / 1e9:.2f} of "
        f"{total / 1e9:.2f} GB are free. Close other programs, or {remedy}."
    )
