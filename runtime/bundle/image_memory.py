"""Memory of a cached image, and of a scene's KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.bundle.manifest import Manifest

START_TOKENS = 80
"""Upper bound of the text tokens before the image tokens, of every template."""


@dataclass(frozen=True)
class ImageMemory:
    """Bytes."""

    cached_image: int
    """Pixels, features, latents, keys and values of one image at the default query length."""
    scene_prefix: int
    """What a scene with a guide keeps more: the KV cache up to the image tokens."""


def longest_prefix(manifest: Manifest, max_context: int) -> int:
    """Return the most tokens of a scene's prefix, with at least one token behind it in ``max_context``."""
    return min(START_TOKENS + manifest.image_side**2, max_context - 1)


def image_memory(manifest: Manifest) -> ImageMemory:
    """Return the memory of an image and a scene. ``cuda`` reserves a whole context for a scene."""
    config, latents = manifest.model, manifest.query_lengths[0]
    rows = config.alignment.layers * 2 * latents * config.alignment.window_size**2 + latents
    features = GLOBAL_CROPS * config.vision.patches
    values = (rows + features) * config.language.hidden_size * np.dtype(manifest.activations).itemsize
    crop = 3 * IMAGE_SIZE**2
    pixels = (GLOBAL_CROPS + 1) * crop + crop * np.dtype(np.float32).itemsize  # the local crop also as floats
    tokens = min(START_TOKENS + manifest.image_side**2, manifest.max_context)
    tokens = manifest.max_context if manifest.target == "cuda" else tokens
    return ImageMemory(cached_image=values + pixels, scene_prefix=tokens * manifest.cache_token_bytes)
