"""Estimate of a bundle's size, and of its memory at run time."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import ExportPlan, plan_export
from fusion_edge.export.planning.rules import LM_HEAD
from fusion_edge.export.planning.targets.tensorrt import TENSORRT
from fusion_edge.runtime.backends.tensorrt.memory_estimate import prompt_cache_bytes
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, VISION_HEADS
from fusion_edge.runtime.bundle.graphs import cache_token_bytes
from fusion_edge.runtime.bundle.image_memory import image_memory
from fusion_edge.runtime.formatting import format_bytes

RUNTIME_BYTES = 130_000_000
"""Python, numpy, Pillow, tokenizers and ONNX Runtime with its sessions (measured)."""
PACKED_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "float8_e4m3fn": 8}
"""Bits of a stored integer or FP8 number, by numpy dtype name."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes."""

    graphs: Mapping[str, int]
    """Size in the bundle of each graph and of the embedding table."""
    bundle: int
    weights: int
    """Weights of the three graphs in memory, and the pages of the embedding table."""
    key_value_cache: int
    """KV cache of a full context. It fills as the conversation grows."""
    cached_image: int
    """Pixels, features, latents, keys and values of one image at the default query length."""
    scene_prefix: int
    """KV cache that a scene with a guide keeps. No part of the peak: a program may do without scenes."""
    activations: int
    """Intermediate arrays: those of the largest graph if graphs share memory, else of all."""
    runtime: int
    """The Python process with its libraries, and the device context if there is one."""

    @property
    def peak(self) -> int:
        """Sum of everything in memory."""
        return self.runtime + self.weights + self.key_value_cache + self.cached_image + self.activations


def plan_for_memory(checkpoint: Checkpoint, options: ExportOptions, fit: int | None) -> ExportPlan:
    """Plan an export, with smaller weights if it needs more than ``fit`` bytes; None: the memory of the preset.

    Notes a smaller ``lm_head`` on standard error. Raises as :func:`plan_export`.
    """
    plan = plan_export(checkpoint, options)
    limit = plan.options.memory if fit is None else fit
    if limit is None or (peak := estimate(plan).peak) <= limit:
        return plan
    small = plan_export(checkpoint, dataclasses.replace(options, is_small=True))
    before, after = plan.formats[LM_HEAD], small.formats[LM_HEAD]
    if before != after:
        sys.stderr.write(
            f"note: {LM_HEAD} is {after}, less accurate than {before}, with which the peak of {format_bytes(peak)} "
            f"exceeds {format_bytes(limit)}\n"
        )
    return small


def estimate(plan: ExportPlan) -> Estimate:
    """Return the sizes of a planned bundle."""
    graphs = {file.name.removesuffix(".data"): file.size for file in plan.data_files}
    for name, content in plan.small_files.items():
        if name.endswith(".onnx"):
            graphs[name.removesuffix(".onnx")] += len(content)
    return Estimate(
        graphs=graphs,
        bundle=plan.bundle_bytes,
        weights=_weights(plan),
        key_value_cache=_key_value_cache(plan),
        **dataclasses.asdict(image_memory(plan.manifest(()))),
        activations=_activations(plan),
        runtime=RUNTIME_BYTES + plan.options.target.context_bytes,
    )


def _item(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def _weights(plan: ExportPlan) -> int:
    """Return the memory of weights: integers as stored, floats in the activations' dtype, scales with their copies."""
    wide = _item(plan.options.activations)
    scale = wide * plan.options.target.scale_copies
    total = 0
    for tensor in (tensor for file in plan.data_files for tensor in file.tensors):
        count = int(np.prod(tensor.shape, dtype=np.int64))
        is_copied = tensor.part == "scales" and tensor.dtype not in PACKED_BITS and not tensor.format.has_codebook
        bits = PACKED_BITS.get(tensor.dtype, 8 * wide)
        total += count * scale if is_copied else count * bits // 8
    return total


def _key_value_cache(plan: ExportPlan) -> int:
    return plan.options.max_context * cache_token_bytes(plan.config, plan.options.target.name, plan.options.cache)


def _activations(plan: ExportPlan) -> int:
    """Return the memory of intermediate arrays: of four crops, of keys and values, of a full prompt."""
    config = plan.config
    vision, language, patches = config.vision, config.language, GLOBAL_CROPS * config.vision.patches
    tower = patches * (6 * vision.width + 2 * vision.mlp_width + VISION_HEADS * vision.patches)
    windows = plan.options.query_lengths[0] * config.alignment.window_size**2
    pairs = windows * language.hidden_size * (2 * config.alignment.layers + 4)
    layer = plan.options.max_context * (3 * language.hidden_size + 4 * language.mlp_width)
    # MatMulBnb4 dequantizes the whole weight.
    sizes = [linear.size for linear in plan.linears.values() if linear.format.has_codebook]
    elements = (tower, pairs, layer + max(sizes, default=0))
    linears = plan.linears.values() if plan.options.target is TENSORRT else ()
    sizes = [linear.size for linear in linears if linear.format.is_weight_only_8_bit and not linear.is_table]
    dequantized = 2 * max(sizes, default=0)
    dequantized += prompt_cache_bytes(plan.manifest(()), plan.options.max_context)
    return plan.options.target.activation_bytes(config, plan.options.max_context, elements) + dequantized
