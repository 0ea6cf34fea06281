"""ONNX functions of activation functions."""

from __future__ import annotations

from onnx import FunctionProto, NodeProto, helper

from fusion_edge.kernels.onnx_functions.builder import define
from fusion_edge.kernels.operators import FAST_GELU, MICROSOFT, QUICK_GELU, SWIGLU


def fast_gelu(x: str, output: str) -> NodeProto:
    """Return a node that computes GELU in its tanh form. FastGelu computes the same as Gelu and is faster on a CPU."""
    return helper.make_node(FAST_GELU.name, [x], [output], domain=MICROSOFT)


def swiglu_function(opset: int) -> FunctionProto:
    """Return SwiGLU, SiLU(gate) * up (https://arxiv.org/abs/2002.05202).

    gate and up ``[...]`` of one float type -> output ``[...]`` of that type.
    """
    nodes = [
        helper.make_node(QUICK_GELU.name, ["gate"], ["activated"], domain=MICROSOFT, alpha=1.0),
        helper.make_node("Mul", ["activated", "up"], ["output"]),
    ]
    return define(SWIGLU, nodes, opset)
