"""ONNX function of attention with a mask, in operators that every runtime has, also for no queries.

ONNX Runtime refuses the operator Attention without queries, which a graph with an int8 cache has in a decode step
(``export/lowering/quantized_kv_cache.py``). ``fusion-build`` replaces the function by that operator.
"""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto, NodeProto, helper

from fusion_edge.kernels.onnx_functions.builder import constant, forward_attribute
from fusion_edge.kernels.operators import DOMAIN

MASKED_ATTENTION = "MaskedAttention"
INPUTS = ("q", "k", "v", "mask")
BLOCKED = -65504.0  # lowest float16: softmax makes it exactly 0


def masked_attention_function(groups: int, opset: int) -> FunctionProto:
    """Return ``softmax(q k^T * scale, masked) v``, with the attribute ``scale``, as the operator Attention.

    q ``[B,heads,L,dim]``, k and v ``[B,heads/groups,M,dim]``, mask ``[1,1,L,M]`` bool -> ``[B,heads,L,dim]``.
    """
    factor = forward_attribute(helper.make_node("Constant", [], ["factor"]), "value_float", "float", "scale")
    imports = [helper.make_opsetid("", opset)]
    nodes = [factor, *attention_nodes(groups)]
    return helper.make_function(DOMAIN, MASKED_ATTENTION, INPUTS, ["output"], nodes, imports, ["scale"])


def attention_nodes(groups: int) -> list[NodeProto]:
    """Return the nodes from :data:`INPUTS` and ``factor``, a float32 scalar, to ``output``."""
    node = helper.make_node
    nodes = [
        constant("blocked", np.array(BLOCKED, np.float32)),
        node("CastLike", ["factor", "q"], ["scale"]),
        node("CastLike", ["blocked", "q"], ["never"]),
        node("Mul", ["q", "scale"], ["scaled"]),
    ]
    query, keys, values, mask, result = "scaled", "k", "v", "mask", "output"
    if groups > 1:
        # Query heads that share keys form a separate axis, over which the keys are broadcast.
        nodes += [
            constant("axis", np.array([2])),
            constant("group", np.array([groups])),
            node("Shape", ["k"], ["batch_and_heads"], start=0, end=2),
            node("Shape", ["q"], ["rows_and_dim"], start=2, end=4),
            node("Concat", ["batch_and_heads", "group", "rows_and_dim"], ["grouped_shape"], axis=0),
            node("Reshape", ["scaled", "grouped_shape"], ["grouped"], allowzero=1),
            node("Unsqueeze", ["k", "axis"], ["shared_keys"]),
            node("Unsqueeze", ["v", "axis"], ["shared_values"]),
            node("Unsqueeze", ["mask", "axis"], ["shared_mask"]),
        ]
        query, keys, values, mask, result = "grouped", "shared_keys", "shared_values", "shared_mask", "grouped_output"
    last_two = [0, 1, 3, 2] if groups == 1 else [0, 1, 2, 4, 3]
    nodes += [
        node("Transpose", [keys], ["columns"], perm=last_two),
        node("MatMul", [query, "columns"], ["scores"]),
        node("Where", [mask, "scores", "never"], ["seen"]),
        node("Softmax", ["seen"], ["weights"], axis=-1),
        node("MatMul", ["weights", values], [result]),
    ]
    if groups > 1:
        nodes += [node("Shape", ["q"], ["shape"]), node("Reshape", [result, "shape"], ["output"], allowzero=1)]
    return nodes
