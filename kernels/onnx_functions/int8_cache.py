"""ONNX function of self-attention over an int8 KV cache, which has a quarter of the bytes of a float32 cache.

GroupQueryAttention reads and writes an int8 cache, but the caller supplies its scales (one per channel and head), and
long inputs are slow. So a prefill attends in float32, derives the scales from its keys and values, and fills the cache.
Decode steps attend over the cache in place. An ``If`` selects the branch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import FunctionProto, GraphProto, NodeProto, TensorProto, helper

from fusion_edge.kernels.onnx_functions.builder import (
    constant,
    define,
    forward_attribute,
    forward_attributes,
    subgraph,
)
from fusion_edge.kernels.operators import CACHED_ATTENTION, INT8_GROUP_QUERY_ATTENTION, MICROSOFT

HEADROOM = 1.2  # keys and values of the answer clip beyond this factor of those of the prompt
SMALLEST_SCALE = 1e-8
PARTS = ("key", "value")
CACHE_TENSORS = (*PARTS, *(f"{part}_scale" for part in PARTS))
"""Tensors that one layer keeps: the caches and their scales."""
SCALING = {"scale_factor": HEADROOM / 127, "smallest_scale": SMALLEST_SCALE}
"""Attributes of the function: the scale of a channel is max(largest magnitude * scale_factor, smallest_scale)."""
SHARED = ("last_position", "total_length", "cos", "sin")
"""Inputs that all layers share."""


def attention_function(kv_heads: int, head_dim: int, opset: int) -> FunctionProto:
    """Return the function for one model's sizes.

    qkv ``[1,L,(heads + 2 * kv_heads) * head_dim]`` float32 -> attended ``[1,L,heads * head_dim]`` float32, caches
    ``[1,kv_heads,capacity,head_dim]`` int8, scales ``[1,kv_heads,1,head_dim]`` float32. ``is_prefill`` is ``[]`` bool.
    """
    then, otherwise = _prefill(kv_heads, head_dim), _decode()
    outputs = list(CACHED_ATTENTION.outputs)
    choice = helper.make_node("If", ["is_prefill"], outputs, then_branch=then, else_branch=otherwise)
    return define(CACHED_ATTENTION, [choice], opset)


def _group_query_attention(inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    name = INT8_GROUP_QUERY_ATTENTION.name
    node = helper.make_node(name, inputs, outputs, domain=MICROSOFT, do_rotary=1, **attributes)
    own = CACHED_ATTENTION.attributes
    return forward_attributes(node, {name: kind for name, kind in own.items() if name not in SCALING})


def _prefill(kv_heads: int, head_dim: int) -> GraphProto:
    """Return the branch that attends in float32 from position 0 and quantizes its keys and values into the cache."""
    name = "prefill"
    no_past, attended = f"{name}.no_past", f"{name}.attended"
    float_parts = [f"{name}.{part}" for part in PARTS]
    nodes = [
        constant(no_past, np.zeros((1, kv_heads, 0, head_dim), np.float32)),
        _group_query_attention(["qkv", "", "", no_past, no_past, *SHARED], [attended, *float_parts]),
        constant(f"{name}.positions", np.array([2])),
        constant(f"{name}.end", np.array([np.iinfo(np.int64).max])),
        *(
            forward_attribute(
                helper.make_node("Constant", [], [f"{name}.{attribute}"]), "value_float", "float", attribute
            )
            for attribute in SCALING
        ),
    ]
    for part in PARTS:
        nodes += _quantize(name, f"{name}.{part}", f"past.{part}")
    caches, scales = [f"{part}.cache" for part in float_parts], [f"{part}.scale" for part in float_parts]
    return subgraph(name, nodes, [attended, *caches, *scales])


def _quantize(name: str, values: str, past: str) -> list[NodeProto]:
    """Return nodes that quantize ``values`` ``[1,heads,L,dim]``.

    They output ``{values}.cache`` int8, of the shape of ``past``, and ``{values}.scale`` float32.
    """

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(operator, inputs, [f"{values}.{output}"], **attributes)

    def own(*outputs: str) -> list[str]:
        return [f"{values}.{output}" for output in outputs]

    return [
        helper.make_node("Abs", [values], own("magnitude")),
        node("ReduceMax", [*own("magnitude"), f"{name}.positions"], "largest", keepdims=1),
        node("Mul", [*own("largest"), f"{name}.scale_factor"], "fitting"),
        node("Max", [*own("fitting"), f"{name}.smallest_scale"], "scale"),
        helper.make_node("Div", [values, *own("scale")], own("scaled")),
        node("Round", own("scaled"), "rounded"),
        node("Cast", own("rounded"), "integers", to=TensorProto.INT8),
        helper.make_node("Shape", [values], own("length"), start=2, end=3),
        # The cache after the prompt keeps its content: decode steps read no further than total_length. Slice copies,
        # so past and present may share memory. Pad needs 5 ms per layer at 900 tokens.
        helper.make_node("Slice", [past, *own("length"), f"{name}.end", f"{name}.positions"], own("rest")),
        node("Concat", own("integers", "rest"), "cache", axis=2),
    ]


def _decode() -> GraphProto:
    """Return the branch that attends with one token over the cache and appends to it in place."""
    name = "step"
    scales = [f"past.{part}_scale" for part in PARTS]
    inputs = ["qkv", "", "", *(f"past.{part}" for part in PARTS), *SHARED, "", "", "", *scales]
    outputs = [f"{name}.attended", *(f"{name}.{part}" for part in PARTS)]
    quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    kept = [helper.make_node("Identity", [scale], [f"{name}.{scale}"]) for scale in scales]
    nodes = [_group_query_attention(inputs, outputs, **quantized), *kept]
    return subgraph(name, nodes, [*outputs, *(f"{name}.{scale}" for scale in scales)])
