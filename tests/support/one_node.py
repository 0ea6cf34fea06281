"""Sessions of one node, with the CPU kernels or with ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

Array = npt.NDArray[Any]


def session_of(
    node: NodeProto,
    function: FunctionProto | None = None,
    tensors: Mapping[str, Array] = MappingProxyType({}),
    use_kernels: bool = True,
) -> ort.InferenceSession:
    """Return a session of ``node``. ``tensors`` are constants; other inputs and the outputs are float32 of any shape.

    ``function`` defines the node's operator, if it is not ONNX Runtime's.
    """
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in node.input
            if name and name not in tensors
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    versions = [helper.make_opsetid(name, version) for name, version in (("", 21), (node.domain, 1))]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4  # tests expect errors
    if use_kernels:
        options.register_custom_ops_library(str(cpu_kernels.library()))
    functions = [] if function is None else [function]
    model = helper.make_model(graph, functions=functions, opset_imports=versions, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def gelu(x: Array) -> Array:
    """Compute GELU in its tanh form, in the type of ``x``."""
    return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
