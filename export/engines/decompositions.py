"""Decompose operators that an older TensorRT does not support into functions of opset-21 operators.

TensorRT reads ``Attention`` since 10.14; ``RMSNormalization``, ``RotaryEmbedding`` and ``TensorScatter`` since 10.15
(onnx-tensorrt's changelog). JetPack 6.2 has 10.3, JetPack 7.0 and 7.1 have 10.13. The functions compute the same, more
slowly: a KV cache is copied instead of updated in place, and attention is fused only where TensorRT recognizes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fusion_edge.kernels.onnx_functions.builder import qualify_names
from fusion_edge.kernels.onnx_functions.masked_attention import INPUTS, MASKED_ATTENTION, attention_nodes
from fusion_edge.kernels.operators import DOMAIN

SINCE = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
}
"""First TensorRT version that supports each operator."""
OPSET, IR_VERSION = 21, 10  # the first with blocked DequantizeLinear
DECOMPOSABLE = "TRT_decomposable"
"""Attribute of Attention in TensorRT's ONNX parser."""


def unsupported_operators(version: tuple[int, ...]) -> list[str]:
    """Return the operators that a TensorRT version ``(major, minor)`` does not support."""
    return [name for name, since in SINCE.items() if version < since]


def decompose_operators(model: ModelProto, names: Sequence[str], groups: int) -> None:
    """Replace nodes of the operators ``names`` by calls of functions, and add the functions to the model.

    ``groups`` is the number of query heads per key-value head, in every Attention node.
    """
    functions: dict[str, FunctionProto] = {}
    for node in model.graph.node:
        if node.op_type in names and not node.domain:
            function = _FUNCTIONS[node.op_type](_attributes(node), groups)
            functions[function.name] = function
            node.op_type, node.domain = function.name, DOMAIN
            del node.attribute[:]
    model.functions.extend(functions.values())
    if set(names) == set(SINCE):
        model.ir_version = IR_VERSION
        for importing in (model, *model.functions):
            for opset in (opset for opset in importing.opset_import if not opset.domain):
                opset.version = OPSET
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def use_attention(model: ModelProto) -> None:
    """Replace the function of masked attention by the operator, for which TensorRT has kernels."""
    for node in model.graph.node:
        if node.op_type == MASKED_ATTENTION and node.domain == DOMAIN:
            node.op_type, node.domain = "Attention", ""
    kept = [function for function in model.functions if function.name != MASKED_ATTENTION]
    del model.functions[:]
    model.functions.extend(kept)


def allow_decomposition(model: ModelProto) -> None:
    """Let TensorRT compute Attention without a fused kernel where it has none for the head size; else it fails."""
    for node in model.graph.node:
        if node.op_type == "Attention" and not node.domain:
            node.attribute.append(helper.make_attribute(DECOMPOSABLE, 1))


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _constant(name: str, values: Any, dtype: str = "int64") -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(values, dtype), name))


def _function(name: str, inputs: list[str], nodes: list[NodeProto]) -> FunctionProto:
    """Return a function with a new name: TensorRT's parser goes by an operator's name and ignores its domain."""
    imports = [helper.make_opsetid("", OPSET)]
    return qualify_names(helper.make_function(DOMAIN, f"Plain{name}", inputs, ["output"], nodes, imports))


def _rms_normalization(attributes: dict[str, Any], groups: int) -> FunctionProto:
    """Make ``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axis, in float32."""
    node = helper.make_node
    nodes = [
        _constant("epsilon", attributes["epsilon"], "float32"),
        _constant("axis", [-1]),
        node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        node("Mul", ["wide", "wide"], ["squares"]),
        node("ReduceMean", ["squares", "axis"], ["mean"], keepdims=1),
        node("Add", ["mean", "epsilon"], ["shifted"]),
        node("Sqrt", ["shifted"], ["root"]),
        node("Div", ["wide", "root"], ["normed"]),
        node("CastLike", ["normed", "x"], ["narrow"]),
        node("Mul", ["narrow", "scale"], ["output"]),
    ]
    return _function("RMSNormalization", ["x", "scale"], nodes)


def _rotary_embedding(attributes: dict[str, Any], groups: int) -> FunctionProto:
    """Make the rotation of the halves of ``x [B,heads,L,dim]`` by rows of the tables ``[positions,dim/2]``."""
    node = helper.make_node
    nodes = [
        _constant("heads", [1]),
        node("Gather", ["cos_table", "positions"], ["cos_rows"], axis=0),
        node("Gather", ["sin_table", "positions"], ["sin_rows"], axis=0),
        node("Unsqueeze", ["cos_rows", "heads"], ["cos"]),
        node("Unsqueeze", ["sin_rows", "heads"], ["sin"]),
        node("Split", ["x"], ["first", "second"], axis=-1, num_outputs=2),
        node("Mul", ["first", "cos"], ["first_cos"]),
        node("Mul", ["second", "sin"], ["second_sin"]),
        node("Mul", ["second", "cos"], ["second_cos"]),
        node("Mul", ["first", "sin"], ["first_sin"]),
        node("Sub", ["first_cos", "second_sin"], ["low"]),
        node("Add", ["second_cos", "first_sin"], ["high"]),
        node("Concat", ["low", "high"], ["output"], axis=-1),
    ]
    return _function("RotaryEmbedding", ["x", "cos_table", "sin_table", "positions"], nodes)


def _tensor_scatter(attributes: dict[str, Any], groups: int) -> FunctionProto:
    """Make the write of ``update [1,heads,L,dim]`` into ``past [1,heads,capacity,dim]``, from row ``start [1]`` on."""
    node = helper.make_node
    nodes = [
        *(_constant(name, value) for name, value in (("zero", 0), ("one", 1), ("scalar", [0]))),
        *(_constant(name, value) for name, value in (("of_heads", [0, 2, 3]), ("of_rows", [0, 1, 3]))),
        node("Shape", ["update"], ["heads_size"], start=1, end=2),
        node("Shape", ["update"], ["rows_size"], start=2, end=3),
        node("Squeeze", ["heads_size", "scalar"], ["heads_count"]),
        node("Squeeze", ["rows_size", "scalar"], ["rows_count"]),
        node("Squeeze", ["start", "scalar"], ["first"]),
        node("Range", ["zero", "heads_count", "one"], ["heads"]),
        node("Range", ["zero", "rows_count", "one"], ["offsets"]),
        node("Add", ["offsets", "first"], ["rows"]),
        _constant("batch_size", [1]),
        node("Concat", ["batch_size", "heads_size", "rows_size", "batch_size"], ["shape"], axis=0),
        node("Unsqueeze", ["heads", "of_heads"], ["head_column"]),
        node("Unsqueeze", ["rows", "of_rows"], ["row_column"]),
        node("Expand", ["head_column", "shape"], ["head_indices"]),
        node("Expand", ["row_column", "shape"], ["row_indices"]),
        node("Sub", ["head_indices", "head_indices"], ["batch_indices"]),
        node("Concat", ["batch_indices", "head_indices", "row_indices"], ["indices"], axis=-1),
        node("ScatterND", ["past", "indices", "update"], ["output"]),
    ]
    return _function("TensorScatter", ["past", "update", "start"], nodes)


def _attention(attributes: dict[str, Any], groups: int) -> FunctionProto:
    """Make ``softmax(q k^T * scale, masked) v``: q ``[B,heads,L,dim]``, k, v ``[B,heads/groups,M,dim]``, mask bool."""
    nodes = [_constant("factor", attributes["scale"], "float32"), *attention_nodes(groups)]
    return _function("Attention", [*INPUTS], nodes)


_FUNCTIONS = {
    "Attention": _attention,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "TensorScatter": _tensor_scatter,
}
