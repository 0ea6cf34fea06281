"""Models written without the package ``onnx``, compared with those that it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fusion_edge.benchmarks.latency.one_node_model import IR_VERSION, OPSETS, one_node_model


def test_models_equal_those_of_onnx() -> None:
    weights: dict[str, npt.NDArray[Any]] = {
        "w": np.arange(300, dtype=np.uint8).reshape(2, 3, 50),
        "s": np.ones((2, 3), np.float32),
    }
    attributes = {"K": 300, "N": 2, "bits": 4, "block_size": 100}
    written = one_node_model("MatMulNBits", {"x": np.float32}, np.float32, weights, "com.microsoft", attributes)

    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]) for name in "xy")
    arrays = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph([node], "MatMulNBits", [x], [y], arrays)
    opsets = [helper.make_opsetid(name, version) for name, version in OPSETS.items()]
    assert onnx.ModelProto.FromString(written) == helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
