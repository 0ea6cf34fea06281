"""The configuration of a FUSION model: sizes, layers, rotary frequencies, query lengths.

The exporter reads it from a checkpoint (``export/checkpoint/config.py``) and writes it to ``bundle.json``; the runtime
reads it from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

IMAGE_SIZE = 384  # side of a crop in pixels
GLOBAL_CROPS = 4  # the 768 x 768 resize cut row by row (docs/fusion-model.md section 1)
VISION_HEADS = 16  # of every released tower (docs/fusion-model.md, "The four released models")
ALIGNMENT_HEADS = 16  # docs/fusion-model.md section 5
VISION_NORM_EPS = 1e-6
ALIGNMENT_NORM_EPS = 1e-5
MINIMUM_QUESTION = 16  # lower bound of tokens for the template and a question


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower as it runs, without the checkpoint's last layer and pooling head."""

    width: int
    layers: int
    mlp_width: int
    patch_size: int

    @property
    def grid(self) -> int:
        """Side of a crop in patches. The convolution has no padding and drops the remainder."""
        return IMAGE_SIZE // self.patch_size

    @property
    def patches(self) -> int:
        """Patches per crop."""
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
    """``[head_dim / 2]`` radians per position, with rope scaling."""
    rotary_scale: float
    """Factor of cos and sin: longrope's attention scaling, otherwise 1."""

    @property
    def cache_values(self) -> int:
        """Values per token in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class AlignmentConfig:
    """The interaction layers (docs/fusion-model.md sections 3 and 5)."""

    layers: int
    start: int
    stride: int
    window_size: int
    query_lengths: tuple[int, ...]
    """Query lengths of the training; square numbers, ascending."""

    def layer_after(self, decoder_layer: int) -> int | None:
        """Return the index of the interaction layer that runs after ``decoder_layer``, or None."""
        k, rest = divmod(decoder_layer - self.start, self.stride)
        return k if rest == 0 and 0 <= k < self.layers else None


@dataclass(frozen=True)
class FusionConfig:
    """Structure of a FUSION model."""

    template: str
    """Name of the conversation template: ``phi_3`` or ``llama_3`` (docs/fusion-model.md section 4)."""
    vision: VisionConfig
    language: LanguageConfig
    alignment: AlignmentConfig
    max_length: int
    """``tokenizer_model_max_length``: the training context in tokens."""
    bos_token_id: int
    eos_token_ids: tuple[int, ...]


def side(square: int) -> int:
    """Return the square root of a square number. Raise ``ValueError`` for any other."""
    root = math.isqrt(square)
    if square <= 0 or root * root != square:
        raise ValueError(f"{square} is not a square number")
    return root
