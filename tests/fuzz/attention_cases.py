"""Random calls of the attention operators, and checks of their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from support.attention_graphs import (
    MASKED,
    Causal,
    cached_feeds,
    causal_feeds,
    causal_reference,
    multi_head_reference,
    rotated,
)

from fusion_edge.kernels.onnx_functions import int8_cache
from fusion_edge.kernels.operators import (
    CACHED_ATTENTION,
    GROUP_QUERY_ATTENTION,
    INT8_GROUP_QUERY_ATTENTION,
    MULTI_HEAD_ATTENTION,
    PACKED_ATTENTION,
    PATCH_ATTENTION,
)
from fuzz.fake_onnxruntime import Attribute
from fuzz.kernel_cases import Array, Case, Random, differs, with_extremes

FLOAT32_ERROR = 6e-6  # relative to the values: float32 has 24 bits, and a lane sums some tens of terms
WIDTHS = (1, 3, 8, 15, 16, 17, 64, 72, 80, 96, 128, 255, 256)


def attention_tolerance(q: Array, k: Array, v: Array, scale: float, bfloat16: bool) -> float:
    """Return the tolerance of results for float64 operands ``[..., heads, width]``.

    bfloat16 rounds each factor with a relative error of 2^-9.
    """
    with np.errstate(all="ignore"):
        largest = np.abs(v[np.isfinite(v)]).max(initial=1)
        score = float(np.linalg.norm(q, axis=-1).max(initial=0) * np.linalg.norm(k, axis=-1).max(initial=0) * scale)
        error = score * (2.0**-7 if bfloat16 else 2.0**-20)
        tolerance = largest * (np.expm1(2 * error) + (2.0**-7 if bfloat16 else FLOAT32_ERROR))
    return float(tolerance) if np.isfinite(tolerance) else np.inf


def multi_head(random: Random) -> Case:
    batch, heads, width = int(random.integers(1, 3)), int(random.integers(1, 4)), int(random.choice(WIDTHS))
    queries, keys = (int(random.choice([1, 2, 7, 16, 33, 65, 300])) for _ in range(2))
    bfloat16, has_mask = bool(random.random() < 0.3), random.random() < 0.7
    has_extremes = random.random() < 0.2
    feeds = {name: random.normal(size=(batch, rows, heads * width)).astype(np.float32) for name, rows in
             (("q", queries), ("k", keys), ("v", keys))}  # fmt: skip
    if has_extremes:
        name = "qkv"[random.integers(3)]
        feeds[name] = with_extremes(feeds[name], random)
    mask = key_mask(random, batch, keys) if has_mask else np.ones((batch, keys), np.int32)
    scale = float(np.float32(random.uniform(0.05, 0.5))) if random.random() < 0.5 else 0.0

    def check(outputs: list[Array], _: str) -> str | None:
        own = {name: feeds[name].astype(np.float64) for name in "qkv"} | {"mask": mask}
        own["q"] = own["q"] * (scale * width**0.5 if scale else 1)
        with np.errstate(all="ignore"):
            expected = multi_head_reference(own, heads)
        q, k, v = (own[name].reshape(batch, -1, heads, width) for name in "qkv")
        return differs(outputs[0], expected, attention_tolerance(q, k, v, width**-0.5, bfloat16), has_extremes)

    attributes: dict[str, Attribute] = {"num_heads": heads, "mask_filter_value": MASKED, "scale": scale}
    return Case(
        MULTI_HEAD_ATTENTION,
        attributes,
        {
            "query": feeds["q"],
            "key": feeds["k"],
            "value": feeds["v"],
            "key_padding_mask": mask if has_mask else None,
        },
        check,
        counts=("num_heads",),
        dependent=("value", "key_padding_mask") if has_mask else ("value",),
        unsupported=("bias", "attention_bias", "past_key", "past_value"),
        bfloat16=bfloat16,
    )


def key_mask(random: Random, batch: int, keys: int) -> Array:
    """Return a random key mask ``[batch, keys]`` with at least one visible key."""
    mask = (random.random((batch, keys)) < 0.7).astype(np.int32)
    mask[:, random.integers(keys)] = 1
    return mask


def packed_attention(random: Random) -> Case:
    batch, heads, width = int(random.integers(1, 3)), int(random.integers(1, 4)), int(random.choice(WIDTHS))
    rows, bfloat16 = int(random.choice([1, 2, 7, 16, 33, 65])), bool(random.random() < 0.3)
    patches = int(random.integers(1, rows + 1)) if random.random() < 0.5 else None
    qkv, has_extremes = random.normal(size=(batch, rows, 3 * heads * width)).astype(np.float32), random.random() < 0.2
    if has_extremes:
        qkv = with_extremes(qkv, random)
    mask = key_mask(random, batch, rows)

    def check(outputs: list[Array], _: str) -> str | None:
        q, k, v = np.split(qkv.astype(np.float64), 3, axis=2)
        with np.errstate(all="ignore"):
            expected = multi_head_reference({"q": q, "k": k, "v": v, "mask": mask}, heads)
            if patches is not None:
                expected[:, patches:] = v.mean(1, keepdims=True)
        q, k, v = (part.reshape(batch, rows, heads, width) for part in (q, k, v))
        return differs(outputs[0], expected, attention_tolerance(q, k, v, width**-0.5, bfloat16), has_extremes)

    attributes: dict[str, Attribute] = {"num_heads": heads, "mask_filter_value": MASKED}
    if patches is not None:
        attributes["patches"] = patches
    operator = PACKED_ATTENTION if patches is None else PATCH_ATTENTION
    counts = ("num_heads",) if patches is None else ("num_heads", "patches")
    inputs = {"qkv": qkv, "key_mask": mask}
    return Case(operator, attributes, inputs, check, counts, dependent=("key_mask",), bfloat16=bfloat16)


def causal_sizes(random: Random, int8: bool) -> tuple[Causal, int, int, int]:
    """Return sizes, number of cached tokens, capacity of the cache, and number of new tokens."""
    kv_heads, width = int(random.integers(1, 4)), int(random.choice(WIDTHS))
    rotary = 2 * int(random.integers(0, width // 2 + 1))
    sizes = Causal(kv_heads * int(random.integers(1, 5)), kv_heads, width, rotary, int8)
    past, length = int(random.choice([0, 1, 5, 17, 100])), int(random.choice([1, 1, 1, 2, 7, 33, 65]))
    return sizes, past, past + int(random.choice([0, length, length, length + 9])), length


GROUP_QUERY_INPUTS = {
    "query": "qkv",
    "past_key": "past_key",
    "past_value": "past_value",
    "seqlens_k": "last_position",
    "total_sequence_length": "total_length",
    "cos_cache": "cos",
    "sin_cache": "sin",
    "k_scale": "key_scale",
    "v_scale": "value_scale",
}
"""Name in ``causal_feeds`` of each input."""


def causal_tolerance(sizes: Causal, feeds: Mapping[str, Array], values: Array, bfloat16: bool) -> float:
    heads = feeds["qkv"][0].astype(np.float64).reshape(feeds["qkv"].shape[1], -1, sizes.width)
    past = feeds["past_key"].astype(np.float64) * (feeds["key_scale"] if sizes.int8 else 1)
    keys = np.concatenate([heads[:, sizes.heads :].reshape(-1, sizes.width), past.reshape(-1, sizes.width)])
    return attention_tolerance(heads[:, : sizes.heads], keys, values, sizes.width**-0.5, bfloat16)


def differing_cache(
    sizes: Causal, feeds: Mapping[str, Array], part: str, present: Array, scale: Array | float, in_place: bool
) -> str | None:
    """Return a message unless a cache holds the past and after it the new keys or values, quantized by ``scale``."""
    length, total = feeds["qkv"].shape[1], int(feeds["total_length"])
    rows = feeds["qkv"][0].astype(np.float64).reshape(length, -1, sizes.width)
    first = sizes.heads + (0 if part == "key" else sizes.kv_heads)
    new = rows[:, first : first + sizes.kv_heads]
    if part == "key":
        new = rotated(new, sizes.rotary, dict(feeds), total - length)
    new = new.swapaxes(0, 1) / scale
    past, before = feeds[f"past_{part}"][0], total - length
    expected = np.zeros(present.shape[1:])
    expected[:, : past.shape[1]] = past if in_place else 0
    expected[:, :before] = past[:, :before]
    expected[:, before:total] = np.clip(np.rint(new), -128, 127) if sizes.int8 else new
    tolerance = np.zeros(expected.shape)
    tolerance[:, before:total] = 1 if sizes.int8 else 1e-5
    return differs(present[0], expected, tolerance)


def causal(random: Random) -> Case:
    sizes, past, capacity, length = causal_sizes(random, int8=random.random() < 0.5)
    feeds, bfloat16 = causal_feeds(sizes, past, capacity, length, random), bool(random.random() < 0.3)
    is_in_place, has_extremes = capacity >= past + length and random.random() < 0.5, random.random() < 0.1
    if has_extremes:
        feeds["qkv"] = with_extremes(feeds["qkv"], random)

    def check(outputs: list[Array], _: str) -> str | None:
        if has_extremes:
            return None
        for part, present in zip(("key", "value"), outputs[1:], strict=True):
            scale = feeds[f"{part}_scale"][0] if sizes.int8 else 1.0
            if wrong := differing_cache(sizes, feeds, part, present, scale, is_in_place):
                return f"{part}: {wrong}"
        expected = causal_reference(sizes, feeds, (outputs[1], outputs[2]))
        values = outputs[2].astype(np.float64) * (feeds["value_scale"] if sizes.int8 else 1)
        return differs(outputs[0], expected, causal_tolerance(sizes, feeds, values, bfloat16 and length > 1))

    attributes: dict[str, Attribute] = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads, "do_rotary": 1}
    attributes["scale"] = float(np.float32(sizes.width**-0.5))
    if sizes.int8:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    dependent = ("past_value", "seqlens_k", "total_sequence_length", "sin_cache")
    return Case(
        INT8_GROUP_QUERY_ATTENTION if sizes.int8 else GROUP_QUERY_ATTENTION,
        attributes,
        {name: feeds.get(feed) for name, feed in GROUP_QUERY_INPUTS.items()},
        check,
        counts=("num_heads", "kv_num_heads"),
        dependent=(*dependent, "k_scale", "v_scale") if sizes.int8 else dependent,
        unsupported=("key", "value", "position_ids", "attention_bias", "head_sink"),
        in_place={"present_key": "past_key", "present_value": "past_value"} if is_in_place else {},
        bfloat16=bfloat16,
    )


def cached(random: Random) -> Case:
    sizes, past, capacity, length = causal_sizes(random, int8=True)
    is_prefill = random.random() < 0.5
    past, capacity = (0, max(capacity, length)) if is_prefill else (past, capacity)
    feeds, bfloat16 = cached_feeds(sizes, past, capacity, length, random), bool(random.random() < 0.3)
    feeds["is_prefill"] = np.array(is_prefill)
    is_in_place, has_extremes = capacity >= past + length and random.random() < 0.5, random.random() < 0.1
    if has_extremes:
        feeds["qkv"] = with_extremes(feeds["qkv"], random)
    own = feeds | {f"past_{part}": feeds[f"past.{part}"] for part in int8_cache.PARTS}

    def check(outputs: list[Array], _: str) -> str | None:
        if has_extremes:
            return None
        present = dict(zip(int8_cache.CACHE_TENSORS, outputs[1:], strict=True))
        for part in int8_cache.PARTS:
            scale = present[f"{part}_scale"]
            if not is_prefill and not np.array_equal(scale, feeds[f"past.{part}_scale"]):
                return f"the scale of the {part} changed"
            keeps_rest = is_in_place or is_prefill
            if wrong := differing_cache(sizes, own, part, present[part], scale[0], keeps_rest):
                return f"{part}: {wrong}"
        read = own | {f"{part}_scale": present[f"{part}_scale"] for part in int8_cache.PARTS}
        if is_prefill:
            expected, values = prefill_reference(sizes, read)
        else:
            expected = causal_reference(sizes, read, (present["key"], present["value"]))
            values = present["value"].astype(np.float64) * present["value_scale"]
        return differs(outputs[0], expected, causal_tolerance(sizes, read, values, bfloat16 and length > 1))

    attributes: dict[str, Attribute] = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads}
    attributes |= {"scale": float(np.float32(sizes.width**-0.5))} | int8_cache.SCALING
    return Case(
        CACHED_ATTENTION,
        attributes,
        feeds,
        check,
        counts=("num_heads", "kv_num_heads"),
        dependent=tuple(name for name in CACHED_ATTENTION.inputs if name not in ("qkv", "past.key", "cos")),
        in_place={f"present.{name}": f"past.{name}" for name in int8_cache.CACHE_TENSORS} if is_in_place else {},
        bfloat16=bfloat16,
    )


def prefill_reference(sizes: Causal, feeds: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return the attention to keys and values before quantization, and the values."""
    length = feeds["qkv"].shape[1]
    rows = feeds["qkv"].astype(np.float64).reshape(length, -1, sizes.width)
    keys, values = rows[:, sizes.heads : -sizes.kv_heads], rows[:, -sizes.kv_heads :]
    present = rotated(keys, sizes.rotary, dict(feeds), 0).swapaxes(0, 1)[None], values.swapaxes(0, 1)[None]
    return causal_reference(replace(sizes, int8=False), dict(feeds), present), present[1]
