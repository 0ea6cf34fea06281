"""The operators ``fusion_edge::...`` that our CPU kernels take whole and ONNX Runtime has not: ONNX functions.

Without our kernels (``kernels/cpu/``) ONNX Runtime inlines a function and runs what it is made of. ``CachedAttention``
is in ``export/lowering/int8_cache.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from fusion_edge.kernels.onnx_functions import DOMAIN

MICROSOFT = "com.microsoft"
PRODUCT_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")
ATTENTION_ATTRIBUTES = {"num_heads": AttributeProto.INT, "mask_filter_value": AttributeProto.FLOAT}


def product_function(opset: int, of_gelu: bool = False) -> FunctionProto:
    """Microsoft's ``MatMulNBits`` of float32 inputs whose scales are float16, as they are stored.

    It would want them in float32: ONNX Runtime converts them when it loads, and keeps twice their bytes, which every
    one-token step reads. Inputs, attributes and output are those of ``MatMulNBits``; ``of_gelu``: of GELU(x).
    """
    inputs = ["x", "values", "scales", "zero_points", "group_indices", "bias"]
    converted = ["activated" if of_gelu else "x", "values", "float_scales", *inputs[3:]]
    nodes = [
        *([_gelu("x")] if of_gelu else []),
        helper.make_node("Cast", ["scales"], ["float_scales"], to=TensorProto.FLOAT),
        with_attributes(
            helper.make_node("MatMulNBits", converted, ["output"], domain=MICROSOFT),
            dict.fromkeys(PRODUCT_ATTRIBUTES, AttributeProto.INT),
        ),
    ]
    name = "GeluMatMulNBits" if of_gelu else "MatMulNBits"
    return function(name, inputs, ["output"], nodes, opset, PRODUCT_ATTRIBUTES)


INTEGER_INPUTS = ("values", "scales", "x_scale", "x_zero_point", "bias")
"""Of a product of inputs and weights rounded to 8 bits, beside x: values ``[N,K]`` int8, their scales ``[N]`` float16,
x's scale ``[]`` float32 and zero point ``[]`` uint8, bias ``[N]`` float32."""


def integer_product_function(opset: int, of_gelu: bool = False) -> FunctionProto:
    """x ``[...,K]`` and :data:`INTEGER_INPUTS` -> output ``[...,N]``, float32."""
    nodes = _integer_product("activated" if of_gelu else "x", "", "output")
    if of_gelu:
        nodes.insert(0, _gelu("x"))
    name = "GeluIntegerProduct" if of_gelu else "IntegerProduct"
    return function(name, ["x", *INTEGER_INPUTS], ["output"], nodes, opset)


def integer_mlp_function(opset: int) -> FunctionProto:
    """Two such products, the second of the GELU of the first: x, inputs of the first, of the second -> output."""
    inputs = ["x", *(f"{part}_{name}" for part in ("up", "down") for name in INTEGER_INPUTS)]
    nodes = [
        *_integer_product("x", "up_", "hidden"),
        _gelu("hidden"),
        *_integer_product("activated", "down_", "output"),
    ]
    return function("IntegerMlp", inputs, ["output"], nodes, opset)


def _integer_product(x: str, prefix: str, output: str) -> list[NodeProto]:
    """The pattern that ONNX Runtime fuses to one product of integers, once it has folded the transposition.

    ``prefix`` of all other names.
    """
    values, scales, *x_grid, bias = (prefix + name for name in INTEGER_INPUTS)
    rounded, weights = f"{prefix}rounded", f"{prefix}weights"
    return [
        helper.make_node("QuantizeLinear", [x, *x_grid], [rounded]),
        helper.make_node("DequantizeLinear", [rounded, *x_grid], [f"{prefix}inputs"]),
        helper.make_node("Transpose", [values], [f"{prefix}by_column"], perm=[1, 0]),
        helper.make_node("Cast", [scales], [f"{prefix}float_scales"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", [f"{prefix}by_column", f"{prefix}float_scales"], [weights], axis=1),
        helper.make_node("MatMul", [f"{prefix}inputs", weights], [f"{prefix}product"]),
        helper.make_node("Add", [f"{prefix}product", bias], [output]),
    ]


def _gelu(x: str) -> NodeProto:
    """FastGelu is the same as Gelu by its hyperbolic tangent, and quicker on a CPU."""
    return helper.make_node("FastGelu", [x], ["activated"], domain=MICROSOFT)


def swiglu_function(opset: int) -> FunctionProto:
    """gate and up ``[...]`` -> output ``[...]``, of one float type: SiLU(gate) * up (https://arxiv.org/abs/2002.05202)."""
    nodes = [
        helper.make_node("QuickGelu", ["gate"], ["activated"], domain=MICROSOFT, alpha=1.0),
        helper.make_node("Mul", ["activated", "up"], ["output"]),
    ]
    return function("SwiGlu", ["gate", "up"], ["output"], nodes, opset)


def packed_attention_function(opset: int) -> FunctionProto:
    """qkv ``[N,L,3W]``, key_mask ``[N,L]`` int32 -> output ``[N,L,W]``: softmax(q k^T / sqrt(width of a head)) v."""
    nodes = [_split(), _attention("q", "output")]
    return function("PackedAttention", ["qkv", "key_mask"], ["output"], nodes, opset, tuple(ATTENTION_ATTRIBUTES))


def patch_attention_function(opset: int) -> FunctionProto:
    """As :func:`packed_attention_function`, but only as many first rows as the attribute ``patches`` says attend.

    The others become the mean of all values (FUSION.md section 2).
    """
    constants = {"zero": [0], "one": [1], "last": [np.iinfo(np.int64).max]}
    patches = with_attributes(helper.make_node("Constant", [], ["count"]), {"value_int": AttributeProto.INT}, "patches")
    nodes = [
        *(helper.make_node("Constant", [], [name], value_ints=values) for name, values in constants.items()),
        patches,
        helper.make_node("Unsqueeze", ["count", "zero"], ["end"]),
        _split(),
        helper.make_node("Slice", ["q", "zero", "end", "one"], ["first_rows"]),
        _attention("first_rows", "attended"),
        helper.make_node("Slice", ["v", "end", "last", "one"], ["rest"]),
        helper.make_node("Shape", ["rest"], ["shape"]),
        helper.make_node("ReduceMean", ["v", "one"], ["mean"], keepdims=1),
        helper.make_node("Expand", ["mean", "shape"], ["means"]),
        helper.make_node("Concat", ["attended", "means"], ["output"], axis=1),
    ]
    attributes = (*ATTENTION_ATTRIBUTES, "patches")
    return function("PatchAttention", ["qkv", "key_mask"], ["output"], nodes, opset, attributes)


def _split() -> NodeProto:
    return helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3)


def _attention(query: str, attended: str) -> NodeProto:
    inputs = [query, "k", "v", "", "key_mask"]
    return with_attributes(
        helper.make_node("MultiHeadAttention", inputs, [attended], domain=MICROSOFT), ATTENTION_ATTRIBUTES
    )


def with_attributes(
    node: NodeProto, attributes: Mapping[str, AttributeProto.AttributeType], source: str | None = None
) -> NodeProto:
    """``node`` with attributes, by name and type, that its function is called with; ``source``: by another name."""
    for name, kind in attributes.items():
        node.attribute.add(name=name, ref_attr_name=source or name, type=kind)
    return node


def function(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    nodes: Sequence[NodeProto],
    opset: int,
    attributes: Sequence[str] = (),
) -> FunctionProto:
    """A function of standard and of Microsoft's operators."""
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, imports, attributes)
