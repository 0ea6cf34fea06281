"""The facts that define one FUSION model: sizes, layers, rotary frequencies, offered query lengths.

Written once, used by all: the exporter reads it off a checkpoint (``export/checkpoint/config.py``), a bundle carries
it in ``bundle.json`` and the runtime reads it back from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

IMAGE_SIZE = 384  # pixels on a side of one crop
GLOBAL_CROPS = 4  # the 768 x 768 resize cut row by row (docs/fusion-model.md section 1)
VISION_HEADS = 16  # every released tower, whatever its width (docs/fusion-model.md, "The four released models")
ALIGNMENT_HEADS = 16  # docs/fusion-model.md section 5
VISION_NORM_EPS = 1e-6
ALIGNMENT_NORM_EPS = 1e-5
MINIMUM_QUESTION = 16  # positions that a template and the shortest question take, at the least


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower as it is run: the checkpoint's last layer and its pooling head are dropped."""

    width: int
    layers: int
    mlp_width: int
    patch_size: int

    @property
    def grid(self) -> int:
        """Patches on a side of one crop (convolution without padding: the remainder is cut off)."""
        return IMAGE_SIZE // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one crop."""
        return self.grid**2


@dataclass(frozen=True)
class LanguageConfig:
    """The Phi-3 or Llama decoder."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    norm_eps: float
    rotary_inverse_frequencies: tuple[float, ...]
    """``[head_dim / 2]`` radians per position, rope scaling applied."""
    rotary_scale: float
    """Factor on cos and sin (longrope's attention scaling; 1 elsewhere)."""

    @property
    def cache_values(self) -> int:
        """Numbers that the KV cache holds of one position."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class AlignmentConfig:
    """The interaction layers (docs/fusion-model.md sections 3 and 5)."""

    layers: int
    start: int
    stride: int
    window_size: int
    query_lengths: tuple[int, ...]
    """Every query length that the checkpoint was trained with; square numbers, ascending."""

    def layer_after(self, decoder_layer: int) -> int | None:
        """Index of the interaction layer that runs after ``decoder_layer``, or None."""
        k, rest = divmod(decoder_layer - self.start, self.stride)
        return k if rest == 0 and 0 <= k < self.layers else None


@dataclass(frozen=True)
class FusionConfig:
    """All of FUSION's structure."""

    template: str
    """Name of the conversation template: ``phi_3`` or ``llama_3`` (docs/fusion-model.md section 4)."""
    vision: VisionConfig
    language: LanguageConfig
    alignment: AlignmentConfig
    max_length: int
    """``tokenizer_model_max_length``: positions that the model was trained with."""
    bos_token_id: int
    eos_token_ids: tuple[int, ...]


def side(square: int) -> int:
    """Side of a square number of tokens. Raises ``ValueError`` if it is none."""
    root = math.isqrt(square)
    if square <= 0 or root * root != square:
        raise ValueError(f"{square} is not a square number")
    return root
