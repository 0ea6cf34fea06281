"""ONNX functions of quantized linear layers."""

from __future__ import annotations

from onnx import FunctionProto, NodeProto, TensorProto, helper

from fusion_edge.kernels.onnx_functions.activations import fast_gelu
from fusion_edge.kernels.onnx_functions.builder import define, forward_attributes
from fusion_edge.kernels.operators import (
    CONTRIBUTED_MATMUL_NBITS,
    GELU_INTEGER_MATMUL,
    GELU_MATMUL_NBITS,
    INTEGER_LINEAR_INPUTS,
    INTEGER_MATMUL,
    INTEGER_MLP,
    MATMUL_NBITS,
    MICROSOFT,
)


def matmul_nbits_function(opset: int, gelu: bool = False) -> FunctionProto:
    """Return Microsoft's ``MatMulNBits`` with float16 scales; inputs and attributes are the same.

    ONNX Runtime's operator needs scales of the type of x, float32. Converted at load, they would have twice the bytes,
    and every decode step reads them. With ``gelu``, GELU is applied to x first.
    """
    operator = GELU_MATMUL_NBITS if gelu else MATMUL_NBITS
    x, values, scales, *others = operator.inputs
    inputs = ["activated" if gelu else x, values, "float_scales", *others]
    matmul = helper.make_node(CONTRIBUTED_MATMUL_NBITS.name, inputs, ["output"], domain=MICROSOFT)
    nodes = [
        *([fast_gelu(x, "activated")] if gelu else []),
        helper.make_node("Cast", [scales], ["float_scales"], to=TensorProto.FLOAT),
        forward_attributes(matmul, operator.attributes),
    ]
    return define(operator, nodes, opset)


def integer_matmul_function(opset: int, gelu: bool = False) -> FunctionProto:
    """Return a linear layer with 8-bit weights and 8-bit activations of a calibrated scale.

    x ``[...,K]`` float32 and :data:`INTEGER_LINEAR_INPUTS` -> output ``[...,N]`` float32. With ``gelu``, GELU
    is applied to x first.
    """
    nodes = _integer_linear("activated" if gelu else "x", "", "output")
    if gelu:
        nodes.insert(0, fast_gelu("x", "activated"))
    return define(GELU_INTEGER_MATMUL if gelu else INTEGER_MATMUL, nodes, opset)


def integer_mlp_function(opset: int) -> FunctionProto:
    """Return two such linear layers with GELU between them: x ``[...,K]`` float32 -> output ``[...,N]`` float32."""
    nodes = [
        *_integer_linear("x", "up_", "hidden"),
        fast_gelu("hidden", "activated"),
        *_integer_linear("activated", "down_", "output"),
    ]
    return define(INTEGER_MLP, nodes, opset)


def _integer_linear(x: str, prefix: str, output: str) -> list[NodeProto]:
    """Return a pattern that ONNX Runtime fuses to an integer GEMM after it folds the Transpose.

    Names other than ``x`` and ``output`` start with ``prefix``.
    """
    values, scales, *quantization, bias = (prefix + name for name in INTEGER_LINEAR_INPUTS)
    quantized, weights = f"{prefix}rounded", f"{prefix}weights"
    return [
        helper.make_node("QuantizeLinear", [x, *quantization], [quantized]),
        helper.make_node("DequantizeLinear", [quantized, *quantization], [f"{prefix}inputs"]),
        helper.make_node("Transpose", [values], [f"{prefix}by_column"], perm=[1, 0]),
        helper.make_node("Cast", [scales], [f"{prefix}float_scales"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", [f"{prefix}by_column", f"{prefix}float_scales"], [weights], axis=1),
        helper.make_node("MatMul", [f"{prefix}inputs", weights], [f"{prefix}product"]),
        helper.make_node("Add", [f"{prefix}product", bias], [output]),
    ]
