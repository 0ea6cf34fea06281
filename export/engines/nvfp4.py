"""TensorRT's operators for NVFP4 linears, in place of the functions that a bundle has for a CPU.

The form is that of TensorRT's documentation ("DynamicQuantize") and of NVIDIA's ModelOpt: FP8 scales pass a
DequantizeLinear, whose results are the scales of another one. TRT_FP4DynamicQuantize computes the block scales of
activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from fusion_edge.export.lowering.nvfp4 import DEQUANTIZE, QUANTIZE
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.quant.formats import NVFP4_BLOCK

TENSORRT = "trt"
"""Domain of operators that only TensorRT's ONNX parser knows."""
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"


def use_fp4(model: ModelProto) -> None:
    """Replace calls of the functions of NVFP4, and give the weights the type FLOAT4E2M1.

    The functions themselves could have other bodies, but TensorRT's parser refuses the second call of a function with
    a DequantizeLinear: its layers have the names of the first call's.
    """
    calls = list(filter(_is_call, model.graph.node))
    if not calls:
        return
    codes = {node.input[0] for node in calls if node.op_type == DEQUANTIZE}
    nodes = [one for node in model.graph.node for one in (_replacement(node) if _is_call(node) else [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            tensor.data_type = TensorProto.FLOAT4E2M1
    model.opset_import.append(helper.make_opsetid(TENSORRT, 1))


def _is_call(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in (DEQUANTIZE, QUANTIZE)


def _replacement(call: NodeProto) -> Iterator[NodeProto]:
    values, scales, block_scales, wide = (
        f"{call.name}.{name}" for name in ("values", "scales", "block_scales", "wide")
    )
    if call.op_type == DEQUANTIZE:
        values, scales, tensor_scale = call.input
    else:
        x, tensor_scale = call.input
        attributes: dict[str, Any] = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
        outputs = [values, scales]
        yield helper.make_node(DYNAMIC_QUANTIZE, [x, tensor_scale], outputs, values, domain=TENSORRT, **attributes)
    yield helper.make_node("DequantizeLinear", [scales, tensor_scale], [block_scales], block_scales)
    yield helper.make_node("DequantizeLinear", [values, block_scales], [wide], wide, axis=-1, block_size=NVFP4_BLOCK)
    yield helper.make_node("Cast", [wide], [*call.output], call.name, to=TensorProto.FLOAT16)
