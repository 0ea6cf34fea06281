"""ONNX functions of the recursive alignment (docs/fusion-model.md section 5), each with a numpy reference.

They cover an interaction layer between its matmuls, which stay ordinary (quantized) linear layers. No Reshape infers a
size, so empty tensors (no questions or no latents, as in decode steps) are valid.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, NodeProto, helper

from fusion_edge.kernels.onnx_functions.builder import constant
from fusion_edge.kernels.operators import DOMAIN

CONTEXT_ATTENTION, ADD_LAYER_NORM, ADD_ROWS = "ContextAttention", "AddLayerNorm", "AddRows"

Values = npt.NDArray[np.float64]


def context_attention_function(heads: int, head_dim: int, dtype: str, opset: int) -> FunctionProto:
    """Return the attention of each latent to its own nine context rows, for one model's sizes and numpy ``dtype``.

    q ``[R,q,D]``, k and v ``[1,q,9,D]`` -> output ``[R,q,D]``, D = heads * head_dim. Mul and ReduceSum compute the
    scores: a batched MatMul would be R * q * heads tiny ones.
    """
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
    return _function(CONTEXT_ATTENTION, ["q", "k", "v"], nodes, opset)


def context_attention_reference(q: Values, k: Values, v: Values, heads: int) -> Values:
    """Compute the same in numpy: q ``[R,q,D]``, k and v ``[1,q,9,D]`` -> ``[R,q,D]``."""
    dim = q.shape[-1] // heads
    output = np.empty_like(q)
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        scores = np.einsum("rqd,qcd->rqc", q[..., part], k[0][..., part]) / math.sqrt(dim)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        output[..., part] = np.einsum("rqc,qcd->rqd", weights, v[0][..., part])
    return output


def add_layer_norm_function(epsilon: float, opset: int) -> FunctionProto:
    """Return LayerNorm(x + residual): x and residual ``[R,q,D]``, weight and bias ``[D]`` -> output ``[R,q,D]``."""
    nodes = [
        helper.make_node("Add", ["x", "residual"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "weight", "bias"], ["output"], axis=-1, epsilon=epsilon),
    ]
    return _function(ADD_LAYER_NORM, ["x", "residual", "weight", "bias"], nodes, opset)


def add_layer_norm_reference(x: Values, residual: Values, weight: Values, bias: Values, epsilon: float) -> Values:
    """Compute the same in numpy."""
    total = x + residual
    centered = total - total.mean(axis=-1, keepdims=True)
    variance = (centered**2).mean(axis=-1, keepdims=True)
    normed: Values = centered / np.sqrt(variance + epsilon) * weight + bias
    return normed


def add_rows_function(opset: int) -> FunctionProto:
    """Return the scatter of the latents into the sequence: rows ``positions`` of x become latents + update.

    x ``[1,L,D]``, positions ``[R,q]`` int64 (distinct, from 0 to L - 1), latents and update ``[R,q,D]`` -> output
    ``[1,L,D]``.
    """
    nodes = [
        constant("batch_axis", np.array([0], dtype=np.int64)),
        constant("last_axis", np.array([-1], dtype=np.int64)),
        helper.make_node("Add", ["latents", "update"], ["rows"]),
        helper.make_node("Squeeze", ["x", "batch_axis"], ["sequence"]),
        helper.make_node("Unsqueeze", ["positions", "last_axis"], ["indices"]),
        helper.make_node("ScatterND", ["sequence", "indices", "rows"], ["replaced"]),
        helper.make_node("Unsqueeze", ["replaced", "batch_axis"], ["output"]),
    ]
    return _function(ADD_ROWS, ["x", "positions", "latents", "update"], nodes, opset)


def add_rows_reference(x: Values, positions: npt.NDArray[np.int64], latents: Values, update: Values) -> Values:
    """Compute the same in numpy."""
    output: Values = x.copy()
    output[0, positions] = latents + update
    return output


def _function(name: str, inputs: list[str], nodes: list[NodeProto], opset: int) -> FunctionProto:
    return helper.make_function(DOMAIN, name, inputs, ["output"], nodes, [helper.make_opsetid("", opset)])
