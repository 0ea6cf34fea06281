"""The operators ``fusion_edge::...`` that our CPU kernels take whole and ONNX Runtime has not: ONNX functions.

Without our kernels (``kernels/cpu/``) ONNX Runtime inlines a function and runs what it is made of. The third one,
``CachedAttention``, is in ``export/int8_cache.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from fusion_edge.kernels.onnx_functions import DOMAIN

MICROSOFT = "com.microsoft"
PRODUCT_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")


def product_function(opset: int) -> FunctionProto:
    """Microsoft's ``MatMulNBits`` of float32 inputs whose scales are float16, as they are stored.

    It would want them in float32: ONNX Runtime converts them when it loads, and keeps twice their bytes, which every
    one-token step reads. Inputs, attributes and output are those of ``MatMulNBits``.
    """
    inputs = ["x", "values", "scales", "zero_points", "group_indices", "bias"]
    converted = [*inputs[:2], "float_scales", *inputs[3:]]
    nodes = [
        helper.make_node("Cast", ["scales"], ["float_scales"], to=TensorProto.FLOAT),
        with_attributes(
            helper.make_node("MatMulNBits", converted, ["output"], domain=MICROSOFT),
            dict.fromkeys(PRODUCT_ATTRIBUTES, AttributeProto.INT),
        ),
    ]
    return function("MatMulNBits", inputs, ["output"], nodes, opset, PRODUCT_ATTRIBUTES)


def swiglu_function(opset: int) -> FunctionProto:
    """gate and up ``[...]`` -> output ``[...]``: SiLU(gate) * up, float32 (https://arxiv.org/abs/2002.05202)."""
    nodes = [
        helper.make_node("QuickGelu", ["gate"], ["activated"], domain=MICROSOFT, alpha=1.0),
        helper.make_node("Mul", ["activated", "up"], ["output"]),
    ]
    return function("SwiGlu", ["gate", "up"], ["output"], nodes, opset)


def with_attributes(node: NodeProto, attributes: dict[str, AttributeProto.AttributeType]) -> NodeProto:
    """``node`` with those attributes, by name and type, that its function is called with."""
    for name, kind in attributes.items():
        node.attribute.add(name=name, ref_attr_name=name, type=kind)
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
