"""Bytes that a run on TensorRT moves to and from memory, which bounds the speed of a decode step."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.quant.bit_allocation import stored_bytes
from fusion_edge.runtime.bundle.graphs import cache_token_bytes, has_per_token_scales

SMALLEST_WINDOW = 512
"""Tokens. It holds 144 latents, a question and an answer; each smaller window would add a profile to every engine."""
SLICE_TRAFFIC = 3
"""Times that a window of the cache crosses the memory bus: TensorRT-RTX copies it before attention reads it."""
LARGEST_SLOTS = 3 / 4
"""Largest part of an int8 cache that is worth a window: a larger one would save little for one more profile."""
DEQUANTIZED_TRAFFIC = 4
"""Bytes in addition to each INT8 or FP8 weight, if a kernel of its own writes it as float16 and the GEMM reads that."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a run moves: the weights, and the KV cache of a decode step."""

    fused: int
    """If TensorRT fuses every dequantization with its GEMM."""
    unfused: int
    """If it dequantizes weights of INT8 and FP8 to float16 before each GEMM. It documents no fusion of them."""


def decode_windows(capacity: int, has_per_token_scales: bool = False) -> list[int]:
    """Return the parts of a KV cache, in tokens, that decode steps may read instead of all; the whole cache is last.

    A window is worth its copy (:data:`SLICE_TRAFFIC`) if it is less than a third of the cache. With per-token
    scales (:func:`fusion_edge.runtime.bundle.graphs.has_per_token_scales`) windows are inputs of fewer tokens, which
    nothing copies; they have up to :data:`LARGEST_SLOTS` of the cache.
    """
    windows = [SMALLEST_WINDOW << i for i in range(capacity.bit_length())]
    if has_per_token_scales:
        return [*(size for size in windows if size <= LARGEST_SLOTS * capacity), capacity]
    return [*(size for size in windows if SLICE_TRAFFIC * size < capacity), capacity]


def moved_tokens(length: int, capacity: int, has_per_token_scales: bool = False) -> int:
    """Return the tokens of a KV cache that a decode step moves, for a sequence of ``length`` tokens."""
    window = next(size for size in decode_windows(capacity, has_per_token_scales) if size >= length)
    return window if window == capacity or has_per_token_scales else SLICE_TRAFFIC * window


def decode_steps(plan: ExportPlan) -> dict[int, Traffic]:
    """Return the traffic of a decode step by the window of the cache that it reads, in tokens."""
    fused, dequantized = _weights(plan, "llm.")
    target, cache, capacity = plan.options.target.name, plan.options.cache, plan.options.max_context
    token, has_rows = cache_token_bytes(plan.config, target, cache), has_per_token_scales(target, cache)
    caches = {size: token * moved_tokens(size, capacity, has_rows) for size in decode_windows(capacity, has_rows)}
    return {size: Traffic(fused + cache, fused + cache + dequantized) for size, cache in caches.items()}


def vision_run(plan: ExportPlan) -> Traffic:
    """Return the traffic of the vision encoder's weights."""
    fused, dequantized = _weights(plan, "vision.")
    return Traffic(fused, fused + dequantized)


def _weights(plan: ExportPlan, prefix: str) -> tuple[int, int]:
    """Return the bytes of the linears whose names start with ``prefix``, and those of dequantizing them first."""
    linears = [linear for name, linear in plan.linears.items() if name.startswith(prefix) and not linear.is_table]
    stored = sum(stored_bytes((one.outputs, one.inputs), one.format, plan.options.target.name) for one in linears)
    int8 = sum(linear.size for linear in linears if linear.format.is_weight_only_8_bit)
    return stored, DEQUANTIZED_TRAFFIC * int8
