"""Expand functions as TensorRT's ONNX parser up to 10.7 does (onnx-tensorrt, ModelImporter and LocalFunctionImporter).

One map holds all tensors by name. A call binds a parameter to its argument only if the map has no tensor of the
parameter's name. Otherwise the parser warns, and the body reads that other tensor. Outputs of nodes in the body belong
to an inner scope and may repeat names of the graph. The graph's outputs are in the map from the start.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper

FIRST_CORRECT = (10, 8)
"""First TensorRT version whose parser binds parameters to arguments."""


def inlined(model: ModelProto) -> ModelProto:
    """Return the model with its functions expanded as by that parser. Raise ``ValueError`` where the parser fails."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.functions[:]
    _Importer(model).write(result.graph)
    return result


class _Importer:
    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._functions = {function.name: function for function in model.functions}
        self._nodes: list[NodeProto] = []
        self._tensors: dict[str, str | None] = dict.fromkeys(value.name for value in model.graph.output)
        """Name in the flat graph of each name. None: an output that is not computed yet."""
        for value in (*model.graph.input, *model.graph.initializer):
            self._tensors[value.name] = value.name

    def write(self, graph: GraphProto) -> None:
        for node in self._graph.node:
            given = self._import(node, "")
            self._tensors.update(zip(node.output, given, strict=True))
        for value in self._graph.output:
            if self._tensors[value.name] != value.name:
                self._nodes.append(helper.make_node("Identity", [self._found(value.name)], [value.name]))
        del graph.node[:]
        graph.node.extend(self._nodes)
        kept = {name for node in self._nodes for name in node.output}
        described = [value for value in graph.value_info if value.name in kept]
        del graph.value_info[:]
        graph.value_info.extend(described)

    def _found(self, name: str) -> str:
        found = self._tensors.get(name)
        if found is None:
            raise ValueError(f"There is no tensor {name}.")
        return found

    def _import(self, node: NodeProto, scope: str) -> list[str]:
        """Append a node and return the names of its outputs in the flat graph."""
        inputs = [self._found(name) if name else "" for name in node.input]
        if node.op_type in self._functions:
            return self._import_function(self._functions[node.op_type], node)
        flat = NodeProto()
        flat.CopyFrom(node)
        flat.input[:] = inputs
        flat.output[:] = [scope + name if name else "" for name in node.output]
        self._nodes.append(flat)
        return list(flat.output)

    def _import_function(self, function: FunctionProto, call: NodeProto) -> list[str]:
        scope, outside = f"call {len(self._nodes)} of {function.name}/", dict(self._tensors)
        self._bind(dict(zip(function.input, call.input, strict=True)))
        for node in function.node:
            given = self._import(node, scope)
            self._tensors.update(zip(node.output, given, strict=True))
        outputs = [self._found(name) for name in function.output]
        self._tensors = outside
        return outputs

    def _bind(self, passed: Mapping[str, str]) -> None:
        for parameter, name in passed.items():
            if parameter not in self._tensors:
                self._tensors[parameter] = self._found(name)
