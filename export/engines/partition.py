"""Cutting a graph into parts that are built one after another, each with a share of the weights.

TensorRT takes four times the bytes of an engine's weights to build it (docs/benchmarks.md): parts bound that. Run in
turn they compute what the whole does, so they cost a few kernel launches less fused at each cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from onnx import ModelProto, ValueInfoProto, helper, shape_inference

from fusion_edge.kernels.onnx_functions.alignment import ADD_ROWS

CROSSING = 2  # values between two parts at the most: an LLM's hidden states and its mask
RESIDUAL = ("Add", ADD_ROWS)  # what makes the hidden states after attention, MLP or an interaction layer


def split(model: ModelProto, parts: int) -> list[ModelProto]:
    """``parts`` models or, where there are not as many places to cut, fewer; their weights are about equal in bytes.

    A graph is cut behind a residual sum where at most :data:`CROSSING` values go on: they are the outputs of one part
    and inputs of later ones. Weights stay where they are, in the data file. Nodes are in topological order.
    """
    sizes = _weights(model)
    crossing = _crossing(model)
    before, total = [0], 0
    counted: set[str] = set()
    for node in model.graph.node:
        total += sum(sizes.get(name, 0) for name in {*node.input} - counted)
        counted |= {*node.input}
        before.append(total)
    places = [
        i
        for i, (node, values) in enumerate(zip(model.graph.node, crossing, strict=True))
        if node.op_type in RESIDUAL and node.output[0] in values and len(values) <= CROSSING
    ]
    cuts = {
        min(places, key=lambda place: abs(before[place + 1] - total * part / parts)) + 1
        for part in range(1, parts)
        if places
    }
    bounds = [0, *sorted(cuts), len(model.graph.node)]
    types = {value.name: value for value in shape_inference.infer_shapes(model, data_prop=True).graph.value_info}
    return [_part(model, types, start, stop, crossing) for start, stop in pairwise(bounds)]


def _weights(model: ModelProto) -> dict[str, int]:
    """Bytes of every initializer in the data file."""
    sizes = {}
    for tensor in model.graph.initializer:
        length = next((entry.value for entry in tensor.external_data if entry.key == "length"), "0")
        sizes[tensor.name] = int(length)
    return sizes


def _crossing(model: ModelProto) -> list[set[str]]:
    """After each node, the values that later nodes read."""
    last = {name: i for i, node in enumerate(model.graph.node) for name in node.input}
    live: set[str] = set()
    crossing = []
    for i, node in enumerate(model.graph.node):
        live = live | {name for name in node.output if name in last}
        live = {name for name in live if last[name] > i}
        crossing.append(live)
    return crossing


def _part(
    model: ModelProto, types: Mapping[str, ValueInfoProto], start: int, stop: int, crossing: list[set[str]]
) -> ModelProto:
    """Nodes ``start`` to ``stop`` as a model of their own."""
    graph = model.graph
    nodes = graph.node[start:stop]
    read, made = {name for node in nodes for name in node.input}, {name for node in nodes for name in node.output}
    entering = crossing[start - 1] & read if start else set()
    leaving = crossing[stop - 1] & made if stop < len(graph.node) else set()
    part = ModelProto()
    part.CopyFrom(model)
    part.graph.Clear()
    part.graph.name = f"{graph.name}.{start}"
    part.graph.node.extend(nodes)
    part.graph.input.extend(types[name] for name in sorted(entering))
    part.graph.input.extend(value for value in graph.input if value.name in read)
    part.graph.output.extend(value for value in graph.output if value.name in made)
    part.graph.output.extend(types[name] for name in sorted(leaving))
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    used = {node.op_type for node in nodes}
    del part.functions[:]
    part.functions.extend(function for function in model.functions if function.name in used)
    return part


def fix_dimension(model: ModelProto, name: str, size: int) -> None:
    """Give a symbolic dimension of the described values a size."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == name:
                dimension.dim_value = size


def tensor_shape(value: ValueInfoProto) -> list[int | str]:
    """Its dimensions, symbolic ones by their names."""
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def tensor_dtype(value: ValueInfoProto) -> str:
    """numpy dtype name."""
    return str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)
