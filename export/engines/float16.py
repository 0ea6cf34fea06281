"""Replace INT8 by float16 in a graph, for a TensorRT that does not build it.

TensorRT 10.16.2 fails to build some graphs with INT8 activations on an Orin (github.com/NVIDIA/TensorRT/issues/4832).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

LARGEST_MODEL = 1_900_000_000
"""Bytes of float16 weights in a model, which protobuf limits to 2 GB."""


def has_int8(model: ModelProto) -> bool:
    """Return whether a model has INT8 weights."""
    return any(tensor.data_type == TensorProto.INT8 and tensor.dims for tensor in model.graph.initializer)


def without_int8(model: ModelProto, folder: Path) -> ModelProto | None:
    """Return the model with INT8 weights dequantized inside it, and without quantized activations.

    ``folder`` holds the external data. Returns None if there is no INT8, or too much of it for one model.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and _is_int8(constants.get(node.input[0]))
    ]
    sizes = [2 * int(np.prod(constants[node.input[0]].dims)) for node in weights]
    if not weights or sum(sizes) > LARGEST_MODEL:
        return None
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    renamed: dict[str, str] = {}
    dequantized = {node.output[0] for node in weights}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in renamed):
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        elif node.output[0] in dequantized:
            values = _dequantized(node, constants, folder)
            result.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        else:
            kept = result.graph.node.add()
            kept.CopyFrom(node)
            kept.input[:] = [renamed.get(name, name) for name in node.input]
    read = {name for node in result.graph.node for name in node.input}
    result.graph.initializer.extend(tensor for name, tensor in constants.items() if name in read)
    return result


def _is_int8(tensor: TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type == TensorProto.INT8


def _dequantized(node: NodeProto, constants: dict[str, TensorProto], folder: Path) -> npt.NDArray[np.float16]:
    """Return the float16 weight ``[N,K]`` of a DequantizeLinear with one scale, or one per row."""
    values, scales = (numpy_helper.to_array(constants[name], str(folder)) for name in node.input[:2])
    weight: npt.NDArray[np.float16] = (values * scales.reshape(-1, *[1] * (values.ndim - 1))).astype(np.float16)
    return weight
