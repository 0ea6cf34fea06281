"""``fusion_edge::ContextAttention``: every latent attends to its own nine context rows (FUSION.md section 5).

It is the one operator of the recursive alignment that no standard operator covers; the products around it stay
ordinary (quantized) linears. It is defined here as an ONNX function of standard operators, which ONNX Runtime
inlines, and as a plain reference in numpy.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, NodeProto, helper, numpy_helper

DOMAIN = "fusion_edge"
NAME = "ContextAttention"


def context_attention_function(heads: int, head_dim: int, dtype: str, opset: int) -> FunctionProto:
    """The operator for one model's sizes: q ``[R,q,D]``, k and v ``[1,q,9,D]`` -> ``[R,q,D]``, D = heads * head_dim.

    Every Reshape copies its leading sizes and states the others, so R = 0 and q = 0 (one-token steps) are valid.
    Products of so few rows are written as multiply and sum: a batched MatMul would be R * q * heads tiny ones.
    """

    def constant(name: str, values: npt.NDArray[np.generic]) -> NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values, name))

    one_query = np.array([0, 0, 1, heads, head_dim], dtype=np.int64)
    split = np.array([0, 0, 0, heads, head_dim], dtype=np.int64)
    nodes = [
        constant("query_shape", one_query),
        constant("context_shape", split),
        constant("output_shape", np.array([0, 0, heads * head_dim], dtype=np.int64)),
        constant("head_axis", np.array([-1], dtype=np.int64)),
        constant("row_axis", np.array([2], dtype=np.int64)),
        constant("scale", np.array(1 / math.sqrt(head_dim), dtype=dtype)),
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "query_shape"], ["query"]),
        helper.make_node("Reshape", ["k", "context_shape"], ["keys"]),
        helper.make_node("Reshape", ["v", "context_shape"], ["values"]),
        helper.make_node("Mul", ["query", "keys"], ["products"]),
        helper.make_node("ReduceSum", ["products", "head_axis"], ["scores"], keepdims=1),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=2),
        helper.make_node("Mul", ["weights", "values"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "row_axis"], ["attended"], keepdims=0),
        helper.make_node("Reshape", ["attended", "output_shape"], ["output"]),
    ]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, NAME, ["q", "k", "v"], ["output"], nodes, imports)


def context_attention_reference(
    q: npt.NDArray[np.float64], k: npt.NDArray[np.float64], v: npt.NDArray[np.float64], heads: int
) -> npt.NDArray[np.float64]:
    """The same in numpy, head by head: ``[R,q,D]``, ``[1,q,9,D]``, ``[1,q,9,D]`` -> ``[R,q,D]``."""
    dim = q.shape[-1] // heads
    output = np.empty_like(q)
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        scores = np.einsum("rqd,qcd->rqc", q[..., part], k[0][..., part]) / math.sqrt(dim)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        output[..., part] = np.einsum("rqc,qcd->rqd", weights, v[0][..., part])
    return output
