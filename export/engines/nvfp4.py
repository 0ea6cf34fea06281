"""TensorRT's operators for NVFP4 linears, in place of the standard ones that a bundle has for a CPU.

The form is that of TensorRT's documentation ("Working with Quantized Types", double quantization) and of NVIDIA's
ModelOpt: FP8 scales pass a DequantizeLinear, whose results are the scales of another one. TRT_FP4DynamicQuantize
computes the block scales of activations.
"""

from __future__ import annotations

from onnx import FunctionProto, ModelProto, TensorProto, helper

from fusion_edge.export.lowering.nvfp4 import DEQUANTIZE, INPUTS, QUANTIZE
from fusion_edge.kernels.onnx_functions.builder import qualify_names
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.quant.formats import NVFP4_BLOCK

TENSORRT = "trt"
"""Domain of operators that only TensorRT's ONNX parser knows."""
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"


def use_fp4(model: ModelProto) -> None:
    """Give the functions of NVFP4 TensorRT's operators, and their weights the type FLOAT4E2M1."""
    bodies = {DEQUANTIZE: _dequantize, QUANTIZE: _quantize}
    functions = [function for function in model.functions if function.name in bodies]
    for function in functions:
        (opset,) = (one.version for one in function.opset_import if not one.domain)
        function.CopyFrom(qualify_names(bodies[function.name](opset)))
    codes = {node.input[0] for node in model.graph.node if node.domain == DOMAIN and node.op_type == DEQUANTIZE}
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            tensor.data_type = TensorProto.FLOAT4E2M1
    if functions:
        model.opset_import.append(helper.make_opsetid(TENSORRT, 1))


def _dequantize(opset: int) -> FunctionProto:
    node = helper.make_node
    nodes = [
        node("DequantizeLinear", ["scales", "tensor_scale"], ["block_scales"]),
        node("DequantizeLinear", ["values", "block_scales"], ["wide"], axis=-1, block_size=NVFP4_BLOCK),
        node("Cast", ["wide"], ["output"], to=TensorProto.FLOAT16),
    ]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, DEQUANTIZE, INPUTS[DEQUANTIZE], ["output"], nodes, imports)


def _quantize(opset: int) -> FunctionProto:
    node = helper.make_node
    nodes = [
        node(
            DYNAMIC_QUANTIZE,
            ["x", "tensor_scale"],
            ["values", "scales"],
            domain=TENSORRT,
            axis=-1,
            block_size=NVFP4_BLOCK,
            scale_type=TensorProto.FLOAT8E4M3FN,
        ),
        node("DequantizeLinear", ["scales", "tensor_scale"], ["block_scales"]),
        node("DequantizeLinear", ["values", "block_scales"], ["wide"], axis=-1, block_size=NVFP4_BLOCK),
        node("Cast", ["wide"], ["output"], to=TensorProto.FLOAT16),
    ]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(TENSORRT, 1)]
    return helper.make_function(DOMAIN, QUANTIZE, INPUTS[QUANTIZE], ["output"], nodes, imports)
