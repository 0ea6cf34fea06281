"""ONNX functions of NVFP4 linears (``quant/nvfp4.py``), in standard operators that ONNX Runtime computes on a CPU.

ONNX Runtime has no kernels for FLOAT4E2M1, so codes are stored as UINT4, with the same bytes. ``fusion-build``
replaces the functions by TensorRT's operators (``export/engines/nvfp4.py``).
"""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper

from fusion_edge.kernels.onnx_functions.builder import constant
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.quant import float4, float8
from fusion_edge.quant.formats import NVFP4_BLOCK

DEQUANTIZE, QUANTIZE = "DequantizeNvfp4", "QuantizeNvfp4"
INPUTS = {DEQUANTIZE: ("values", "scales", "tensor_scale"), QUANTIZE: ("x", "tensor_scale")}
"""Inputs by function, in order; each has one output, ``output``."""


def dequantize_function(opset: int) -> FunctionProto:
    """Return ``values * scales * tensor_scale``, float16 ``[N,K]``.

    ``values`` ``[N,K]`` are codes of E2M1 as uint4, ``scales`` ``[N,K/16]`` float8_e4m3fn, ``tensor_scale`` ``[]``
    float32.
    """
    node = helper.make_node
    nodes = [
        constant("levels", float4.VALUES),
        constant("last", np.array([-1], np.int64)),
        constant("blocks", np.array([0, -1, NVFP4_BLOCK], np.int64)),
        node("Cast", ["values"], ["codes"], to=TensorProto.INT32),
        node("Gather", ["levels", "codes"], ["rows"], axis=0),
        node("Reshape", ["rows", "blocks"], ["blocked"]),
        node("DequantizeLinear", ["scales", "tensor_scale"], ["block_scales"]),
        node("Unsqueeze", ["block_scales", "last"], ["column"]),
        node("Mul", ["blocked", "column"], ["scaled"]),
        node("Shape", ["codes"], ["shape"]),
        node("Reshape", ["scaled", "shape"], ["weights"]),
        node("Cast", ["weights"], ["output"], to=TensorProto.FLOAT16),
    ]
    return _function(DEQUANTIZE, nodes, opset)


def quantize_function(opset: int) -> FunctionProto:
    """Return activations ``x`` ``[...,K]`` quantized with ``tensor_scale`` ``[]`` float32, and dequantized.

    Blocks may be empty. Float4 steps are 0.5 up to 2, 1 up to 4, then 2.
    """
    node = helper.make_node
    largest = float4.LARGEST
    nodes = [
        *(constant(name, np.array(value, np.float32)) for name, value in _NUMBERS.items()),
        constant("last", np.array([-1], np.int64)),
        constant("block", np.array([NVFP4_BLOCK], np.int64)),
        constant("divisor", np.array(largest, np.float32)),
        # A Reshape of a value that may be empty infers no size.
        node("Shape", ["x"], ["shape"]),
        node("Shape", ["x"], ["outer"], end=-1),
        node("Shape", ["x"], ["width"], start=-1),
        node("Div", ["width", "block"], ["count"]),
        node("Concat", ["outer", "count", "block"], ["blocked_shape"], axis=0),
        node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        node("Reshape", ["wide", "blocked_shape"], ["blocked"]),
        node("Abs", ["blocked"], ["magnitudes"]),
        node("ReduceMax", ["magnitudes", "last"], ["extent"], keepdims=1),
        node("Mul", ["tensor_scale", "divisor"], ["unit"]),
        node("Div", ["extent", "unit"], ["ratio"]),
        node("Min", ["ratio", "largest_scale"], ["clipped_ratio"]),
        node("Cast", ["clipped_ratio"], ["float8"], to=TensorProto.FLOAT8E4M3FN),
        node("DequantizeLinear", ["float8", "tensor_scale"], ["scales"]),
        node("Greater", ["scales", "zero"], ["is_positive"]),
        node("Where", ["is_positive", "scales", "one"], ["divisors"]),
        node("Div", ["blocked", "divisors"], ["scaled"]),
        node("Max", ["scaled", "least"], ["above"]),
        node("Min", ["above", "most"], ["clipped"]),
        node("Abs", ["clipped"], ["sizes"]),
        node("Less", ["sizes", "two"], ["is_small"]),
        node("Less", ["sizes", "four"], ["is_medium"]),
        node("Where", ["is_medium", "one", "two"], ["wide_steps"]),
        node("Where", ["is_small", "half", "wide_steps"], ["steps"]),
        node("Div", ["clipped", "steps"], ["counts"]),
        node("Round", ["counts"], ["whole"]),
        node("Mul", ["whole", "steps"], ["levels"]),
        node("Mul", ["levels", "scales"], ["values"]),
        node("Reshape", ["values", "shape"], ["rows"]),
        node("CastLike", ["rows", "x"], ["output"]),
    ]
    return _function(QUANTIZE, nodes, opset)


_NUMBERS = {
    **{"zero": 0.0, "half": 0.5, "one": 1.0, "two": 2.0, "four": 4.0},
    **{"least": -float4.LARGEST, "most": float4.LARGEST, "largest_scale": float(float8.LARGEST)},
}


def _function(name: str, nodes: list[NodeProto], opset: int) -> FunctionProto:
    return helper.make_function(DOMAIN, name, INPUTS[name], ["output"], nodes, [helper.make_opsetid("", opset)])
