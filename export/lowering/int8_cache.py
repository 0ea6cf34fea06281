"""Self-attention over an int8 KV cache: a quarter of what a decode step reads second most of.

GroupQueryAttention reads and writes an int8 cache whose scales (one a channel and head) must be given, and it is
slow there for long inputs. So a prefill attends in float, derives the scales from its own keys and values and
fills the cache; one-token steps then attend over the cache in place. ``If`` chooses between the two. All of it is one
function, which our CPU kernels (``kernels/cpu/``) take whole; elsewhere it is inlined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper

from fusion_edge.export.lowering.graph_builder import subgraph
from fusion_edge.kernels import cpu_functions
from fusion_edge.kernels.cpu_functions import MICROSOFT
from fusion_edge.kernels.onnx_functions import constant

HEADROOM = 1.2  # keys and values of the answer may exceed those of the prompt by so much before they are clipped
SMALLEST_SCALE = 1e-8
PARTS = ("key", "value")
STATES = (*PARTS, *(f"{part}_scale" for part in PARTS))
"""What a layer keeps: caches and their scales."""
ATTRIBUTES = {
    "num_heads": AttributeProto.INT,
    "kv_num_heads": AttributeProto.INT,
    "scale": AttributeProto.FLOAT,
}
"""Of the function, as GroupQueryAttention has them."""
SCALING = {"scale_factor": HEADROOM / 127, "smallest_scale": SMALLEST_SCALE}
"""More of them: a channel's scale is its largest value times the first, but at least the second."""
SHARED = ("last_position", "total_length", "cos", "sin")
"""Inputs of every layer."""


def attention_function(kv_heads: int, head_dim: int, opset: int) -> FunctionProto:
    """qkv ``[1,L,(heads + 2 * kv_heads) * head_dim]`` -> attended ``[1,L,heads * head_dim]``, caches and scales.

    Caches ``[1,kv_heads,positions,head_dim]`` int8, scales ``[1,kv_heads,1,head_dim]``; ``is_prefill`` ``[]`` bool.
    """
    branches = {"then_branch": _prefill(kv_heads, head_dim), "else_branch": _step()}
    outputs = ["attended", *(f"present.{state}" for state in STATES)]
    inputs = ["qkv", *(f"past.{state}" for state in STATES), *SHARED, "is_prefill"]
    choice = helper.make_node("If", ["is_prefill"], outputs, **branches)
    return cpu_functions.function("CachedAttention", inputs, outputs, [choice], opset, (*ATTRIBUTES, *SCALING))


def _attribute(name: str, value: str) -> NodeProto:
    """An attribute of the function as a value."""
    node = helper.make_node("Constant", [], [value])
    return cpu_functions.with_attributes(node, {"value_float": AttributeProto.FLOAT}, name)


def _query(inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    node = helper.make_node("GroupQueryAttention", inputs, outputs, domain=MICROSOFT, do_rotary=1, **attributes)
    return cpu_functions.with_attributes(node, ATTRIBUTES)


def _prefill(kv_heads: int, head_dim: int) -> GraphProto:
    """Float attention from position 0, its keys and values quantized into the cache."""
    name = "prefill"
    no_past, attended = f"{name}.no_past", f"{name}.attended"
    float_parts = [f"{name}.{part}" for part in PARTS]
    nodes = [
        constant(no_past, np.zeros((1, kv_heads, 0, head_dim), np.float32)),
        _query(["qkv", "", "", no_past, no_past, *SHARED], [attended, *float_parts]),
        constant(f"{name}.positions", np.array([2])),
        constant(f"{name}.end", np.array([np.iinfo(np.int64).max])),
        *(_attribute(attribute, f"{name}.{attribute}") for attribute in SCALING),
    ]
    for part in PARTS:
        nodes += _quantize(name, f"{name}.{part}", f"past.{part}")
    caches, scales = [f"{part}.cache" for part in float_parts], [f"{part}.scale" for part in float_parts]
    return subgraph(name, nodes, [attended, *caches, *scales])


def _quantize(name: str, values: str, past: str) -> list[NodeProto]:
    """``values`` ``[1,heads,L,dim]`` -> ``{values}.cache`` int8, as long as ``past``, and ``{values}.scale``."""

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
        # Behind the prompt stays what was there: steps read no further than total_length. Slice copies, so past and
        # present may share memory. (Pad would take 5 ms a layer at 900 positions.)
        helper.make_node("Slice", [past, *own("length"), f"{name}.end", f"{name}.positions"], own("rest")),
        node("Concat", own("integers", "rest"), "cache", axis=2),
    ]


def _step() -> GraphProto:
    """One token over the cache, which it extends in place."""
    name = "step"
    scales = [f"past.{part}_scale" for part in PARTS]
    inputs = ["qkv", "", "", *(f"past.{part}" for part in PARTS), *SHARED, "", "", "", *scales]  # bias, sinks: none
    outputs = [f"{name}.attended", *(f"{name}.{part}" for part in PARTS)]
    quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    kept = [helper.make_node("Identity", [scale], [f"{name}.{scale}"]) for scale in scales]
    nodes = [_query(inputs, outputs, **quantized), *kept]
    return subgraph(name, nodes, [*outputs, *(f"{name}.{scale}" for scale in scales)])
