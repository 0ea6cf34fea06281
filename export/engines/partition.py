"""Partition a graph into smaller graphs, which are built and run one after another.

Building an engine needs four times the memory of its weights (docs/benchmarks.md). Partitions limit this, and cost a
few fused kernels at each cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from onnx import ModelProto, ValueInfoProto, shape_inference

from fusion_edge.kernels.onnx_functions.alignment import ADD_ROWS

MAX_CROSSING = 2  # values between two partitions: the LLM's hidden states and its mask
RESIDUAL = ("Add", ADD_ROWS)  # nodes that output the hidden states after attention, MLP or an interaction layer


def partition_graph(model: ModelProto, count: int) -> list[ModelProto]:
    """Return ``count`` partitions of a model with about equal bytes of weights. There are fewer if it has too few cuts.

    A cut is possible after a residual sum, if at most :data:`MAX_CROSSING` values cross it. They are outputs of one
    partition and inputs of later ones. Weights stay in the data file. Nodes must be in topological order.
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
        if node.op_type in RESIDUAL and node.output[0] in values and len(values) <= MAX_CROSSING
    ]
    cuts = {
        min(places, key=lambda place: abs(before[place + 1] - total * number / count)) + 1
        for number in range(1, count)
        if places
    }
    bounds = [0, *sorted(cuts), len(model.graph.node)]
    types = {value.name: value for value in shape_inference.infer_shapes(model, data_prop=True).graph.value_info}
    return [_partition(model, types, start, stop, crossing) for start, stop in pairwise(bounds)]


def _weights(model: ModelProto) -> dict[str, int]:
    """Return the bytes of every initializer in the data file."""
    sizes = {}
    for tensor in model.graph.initializer:
        length = next((entry.value for entry in tensor.external_data if entry.key == "length"), "0")
        sizes[tensor.name] = int(length)
    return sizes


def _crossing(model: ModelProto) -> list[set[str]]:
    """Return, for each node, the values that later nodes read from it or from earlier ones."""
    last = {name: i for i, node in enumerate(model.graph.node) for name in node.input}
    live: set[str] = set()
    crossing = []
    for i, node in enumerate(model.graph.node):
        live = live | {name for name in node.output if name in last}
        live = {name for name in live if last[name] > i}
        crossing.append(live)
    return crossing


def _partition(
    model: ModelProto, types: Mapping[str, ValueInfoProto], start: int, stop: int, crossing: list[set[str]]
) -> ModelProto:
    """Return nodes ``start`` to ``stop`` as a model."""
    graph = model.graph
    nodes = graph.node[start:stop]
    read, made = {name for node in nodes for name in node.input}, {name for node in nodes for name in node.output}
    entering = crossing[start - 1] & read if start else set()
    leaving = crossing[stop - 1] & made if stop < len(graph.node) else set()
    partition = ModelProto()
    partition.CopyFrom(model)
    partition.graph.Clear()
    partition.graph.name = f"{graph.name}.{start}"
    partition.graph.node.extend(nodes)
    partition.graph.input.extend(types[name] for name in sorted(entering))
    partition.graph.input.extend(value for value in graph.input if value.name in read)
    partition.graph.output.extend(value for value in graph.output if value.name in made)
    partition.graph.output.extend(types[name] for name in sorted(leaving))
    partition.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    used = {node.op_type for node in nodes}
    del partition.functions[:]
    partition.functions.extend(function for function in model.functions if function.name in used)
    return partition
