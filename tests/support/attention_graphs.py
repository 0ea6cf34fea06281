"""Graphs of one attention operator, their inputs, and references in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import FunctionProto, TensorProto, helper

from fusion_edge.kernels.onnx_functions import int8_cache
from fusion_edge.kernels.onnx_functions.attention import packed_attention_function, patch_attention_function

Array = npt.NDArray[Any]
FLOAT, INT8, INT32 = int(TensorProto.FLOAT), int(TensorProto.INT8), int(TensorProto.INT32)
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("fusion_edge", 1)]
MASKED = -1e9  # added to scores of masked keys


@dataclass(frozen=True)
class Causal:
    """Sizes of a GroupQueryAttention."""

    heads: int
    kv_heads: int
    width: int
    rotary: int
    int8: bool = False


def session(model: bytes, library: Path | None, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session of ``model`` with the kernels of ``library``, or with ONNX Runtime's own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # tests expect errors
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(
    operator: str,
    inputs: dict[str, tuple[int, int]],
    outputs: dict[str, int],
    attributes: dict[str, Any],
    function: FunctionProto | None = None,
) -> bytes:
    """Return a model of one node.

    Inputs are element type and rank by name; a name that starts with ``-`` is a missing input. Outputs are types.
    """
    names = ["" if name.startswith("-") else name for name in inputs]
    domain = "com.microsoft" if function is None else function.domain
    node = helper.make_node(operator, names, list(outputs), domain=domain, **attributes)
    given = [
        helper.make_tensor_value_info(name, dtype, [None] * rank)
        for name, (dtype, rank) in inputs.items()
        if not name.startswith("-")
    ]
    made = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()]
    graph = helper.make_graph([node], operator, given, made)
    functions = [] if function is None else [function]
    model = helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=10)
    return bytes(model.SerializeToString())


def multi_head_model(heads: int, **attributes: Any) -> bytes:
    inputs = {"q": (FLOAT, 3), "k": (FLOAT, 3), "v": (FLOAT, 3), "-bias": (FLOAT, 1), "mask": (INT32, 2)}
    fixed = {"num_heads": heads, "mask_filter_value": MASKED}
    return _model("MultiHeadAttention", inputs, {"attended": FLOAT}, fixed | attributes)


def packed_model(heads: int, patches: int | None) -> bytes:
    """Return the model of PackedAttention, or of PatchAttention with ``patches``."""
    every, some = packed_attention_function(21), patch_attention_function(21)
    function = every if patches is None else some
    fixed: dict[str, Any] = {"num_heads": heads, "mask_filter_value": MASKED}
    if patches is not None:
        fixed["patches"] = patches
    inputs = {"qkv": (FLOAT, 3), "key_mask": (INT32, 2)}
    return _model(function.name, inputs, {"attended": FLOAT}, fixed, function)


def causal_model(sizes: Causal, **attributes: Any) -> bytes:
    cache = INT8 if sizes.int8 else FLOAT
    inputs = {"qkv": (FLOAT, 3), "-key": (FLOAT, 3), "-value": (FLOAT, 3), "past_key": (cache, 4)}
    inputs |= {"past_value": (cache, 4), "last_position": (INT32, 1), "total_length": (INT32, 0)}
    inputs |= {"cos": (FLOAT, 2), "sin": (FLOAT, 2)}
    fixed: dict[str, Any] = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads, "do_rotary": 1}
    fixed["scale"] = sizes.width**-0.5
    if sizes.int8:
        inputs |= {"-positions": (INT32, 2), "-bias": (FLOAT, 4), "-sinks": (FLOAT, 1)}
        inputs |= {"key_scale": (FLOAT, 4), "value_scale": (FLOAT, 4)}
        fixed |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    outputs = {"attended": FLOAT, "present_key": cache, "present_value": cache}
    return _model("GroupQueryAttention", inputs, outputs, fixed | attributes)


def cached_model(sizes: Causal) -> bytes:
    """Return the model of CachedAttention."""
    function = int8_cache.attention_function(sizes.kv_heads, sizes.width, opset=21)
    types = {name: (FLOAT, 4) if "scale" in name else (INT8, 4) for name in function.input if "past" in name}
    types |= {"qkv": (FLOAT, 3), "last_position": (INT32, 1), "total_length": (INT32, 0)}
    types |= {"cos": (FLOAT, 2), "sin": (FLOAT, 2), "is_prefill": (int(TensorProto.BOOL), 0)}
    outputs = {name: INT8 if name in ("present.key", "present.value") else FLOAT for name in function.output}
    attributes = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads, "scale": sizes.width**-0.5}
    attributes |= int8_cache.SCALING
    return _model(function.name, {name: types[name] for name in function.input}, outputs, attributes, function)


def cached_feeds(
    sizes: Causal, past: int, capacity: int, length: int, random: np.random.Generator | None = None
) -> dict[str, Array]:
    """Return random inputs of CachedAttention: a prefill if there is no past."""
    feeds = causal_feeds(sizes, past, capacity, length, random)
    for part in ("key", "value"):
        feeds[f"past.{part}"], feeds[f"past.{part}_scale"] = feeds.pop(f"past_{part}"), feeds.pop(f"{part}_scale")
    return feeds | {"is_prefill": np.array(past == 0)}


def causal_feeds(
    sizes: Causal, past: int, capacity: int, length: int, random: np.random.Generator | None = None
) -> dict[str, Array]:
    """Return random inputs of ``length`` tokens after ``past`` cached ones, with caches of ``capacity`` tokens."""
    random = random or np.random.default_rng(length)
    total, heads = past + length, sizes.heads + 2 * sizes.kv_heads
    angles = np.arange(total + 3)[:, None] * 1e4 ** -np.linspace(0, 1, sizes.rotary // 2)
    feeds: dict[str, Array] = {
        "qkv": random.normal(size=(1, length, heads * sizes.width)).astype(np.float32),
        "last_position": np.array([total - 1], np.int32),
        "total_length": np.array(total, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for part in ("key", "value"):
        cache = random.normal(size=(1, sizes.kv_heads, capacity, sizes.width)).astype(np.float32)
        feeds[f"past_{part}"] = cache
        if sizes.int8:
            scale = random.uniform(0.01, 0.03, (1, sizes.kv_heads, 1, sizes.width)).astype(np.float32)
            feeds |= {
                f"{part}_scale": scale,
                f"past_{part}": np.clip(np.rint(cache / scale), -128, 127).astype(np.int8),
            }
    return feeds


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    normalized: Array = weights / weights.sum(-1, keepdims=True)
    return normalized


def multi_head_reference(feeds: dict[str, Array], heads: int) -> Array:
    def per_head(name: str) -> Array:
        rows = feeds[name].astype(np.float64)
        split: Array = rows.reshape(*rows.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        return split

    q, k, v = (per_head(name) for name in "qkv")
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5
    weights = softmax(np.where(feeds["mask"][:, None, None, :] != 0, scores, MASKED))
    attended: Array = (weights @ v).transpose(0, 2, 1, 3).reshape(feeds["q"].shape)
    return attended


def causal_reference(sizes: Causal, feeds: dict[str, Array], present: tuple[Array, Array]) -> Array:
    """Return the attention to a cache that already holds the new keys and values."""
    length, total = feeds["qkv"].shape[1], int(feeds["total_length"])
    rows = feeds["qkv"][0].astype(np.float64).reshape(length, -1, sizes.width)
    q = rotated(rows[:, : sizes.heads], sizes.rotary, feeds, total - length).swapaxes(0, 1)
    scales = [feeds[f"{part}_scale"][0] if sizes.int8 else np.float32(1) for part in ("key", "value")]
    k, v = (
        np.repeat(cache[0, :, :total].astype(np.float64) * scale, sizes.heads // sizes.kv_heads, 0)
        for cache, scale in zip(present, scales, strict=True)
    )
    visible = np.arange(total) <= np.arange(total - length, total)[:, None]
    weights = softmax(np.where(visible, q @ k.swapaxes(1, 2) * sizes.width**-0.5, -np.inf))
    attended: Array = (weights @ v).swapaxes(0, 1).reshape(1, length, -1)
    return attended


def rotated(x: Array, rotary: int, feeds: dict[str, Array], past: int) -> Array:
    """Return ``[length, heads, width]`` after the rotary embedding."""
    cos, sin = (feeds[name][past : past + len(x), None].astype(np.float64) for name in ("cos", "sin"))
    a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rotary:]], -1)
