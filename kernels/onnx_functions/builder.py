"""Helpers to build ONNX functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, helper, numpy_helper

from fusion_edge.kernels.operators import MICROSOFT, AttributeType, Operator

ATTRIBUTE_TYPES = {"int": AttributeProto.INT, "float": AttributeProto.FLOAT, "string": AttributeProto.STRING}


def define(operator: Operator, nodes: Sequence[NodeProto], opset: int) -> FunctionProto:
    """Return the function of an operator: ``nodes`` are of the standard and of Microsoft's domain."""
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    signature = list(operator.inputs), list(operator.outputs)
    return helper.make_function(operator.domain, operator.name, *signature, nodes, imports, list(operator.attributes))


def forward_attributes(node: NodeProto, attributes: Mapping[str, AttributeType]) -> NodeProto:
    """Add attributes to ``node`` whose values are the function's attributes of the same names; return ``node``."""
    for name, kind in attributes.items():
        forward_attribute(node, name, kind, name)
    return node


def forward_attribute(node: NodeProto, name: str, kind: str, source: str) -> NodeProto:
    """Add the attribute ``name``, whose value is the function's attribute ``source``; return ``node``."""
    node.attribute.add(name=name, ref_attr_name=source, type=ATTRIBUTE_TYPES[kind])
    return node


def constant(name: str, values: npt.NDArray[np.generic]) -> NodeProto:
    """Return a Constant node that outputs an array as ``name``."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values, name))


def subgraph(name: str, nodes: Sequence[NodeProto], outputs: Iterable[str]) -> GraphProto:
    """Return a branch of an ``If``. It sees the values of the enclosing graph."""
    return helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info(output) for output in outputs])


def qualify_names(function: FunctionProto) -> FunctionProto:
    """Prefix all names in ``function`` with its own, as in ``AddRows::positions``; return ``function``.

    No tensor of a graph has a colon in its name. TensorRT's
    ONNX parser up to 10.7 has no scope for function parameters: a parameter that has the name of a tensor around the
    call is resolved to that tensor, whatever the call passes.
    """
    prefix = f"{function.name}::"
    nodes = [names for node in function.node for names in (node.input, node.output)]
    for names in (function.input, function.output, *nodes):
        names[:] = [name and prefix + name for name in names]
    return function
