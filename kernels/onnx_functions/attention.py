"""ONNX functions of the vision encoder's attention."""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto, NodeProto, helper

from fusion_edge.kernels.onnx_functions.builder import define, forward_attribute, forward_attributes
from fusion_edge.kernels.operators import MICROSOFT, MULTI_HEAD_ATTENTION, PACKED_ATTENTION, PATCH_ATTENTION


def packed_attention_function(opset: int) -> FunctionProto:
    """Return self-attention over packed rows: softmax(q k^T / sqrt(head width)) v.

    qkv ``[N,L,3W]`` float32, key_mask ``[N,L]`` int32 (0: masked) -> output ``[N,L,W]`` float32.
    """
    return define(PACKED_ATTENTION, [_split_qkv(), _attention("q", "output")], opset)


def patch_attention_function(opset: int) -> FunctionProto:
    """Return :func:`packed_attention_function` for the first ``patches`` rows only (an attribute).

    Each other row becomes the mean of all values (docs/fusion-model.md section 2).
    """
    constants = {"zero": [0], "one": [1], "last": [np.iinfo(np.int64).max]}
    patches = forward_attribute(helper.make_node("Constant", [], ["count"]), "value_int", "int", "patches")
    nodes = [
        *(helper.make_node("Constant", [], [name], value_ints=values) for name, values in constants.items()),
        patches,
        helper.make_node("Unsqueeze", ["count", "zero"], ["end"]),
        _split_qkv(),
        helper.make_node("Slice", ["q", "zero", "end", "one"], ["first_rows"]),
        _attention("first_rows", "attended"),
        helper.make_node("Slice", ["v", "end", "last", "one"], ["rest"]),
        helper.make_node("Shape", ["rest"], ["shape"]),
        helper.make_node("ReduceMean", ["v", "one"], ["mean"], keepdims=1),
        helper.make_node("Expand", ["mean", "shape"], ["means"]),
        helper.make_node("Concat", ["attended", "means"], ["output"], axis=1),
    ]
    return define(PATCH_ATTENTION, nodes, opset)


def _split_qkv() -> NodeProto:
    return helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3)


def _attention(query: str, output: str) -> NodeProto:
    node = helper.make_node(MULTI_HEAD_ATTENTION.name, [query, "k", "v", "", "key_mask"], [output], domain=MICROSOFT)
    return forward_attributes(node, PACKED_ATTENTION.attributes)
