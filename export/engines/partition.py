"""Partition a graph into smaller graphs, which are built and run one after another.

Building an engine needs four times the memory of its weights (docs/benchmarks.md), and TensorRT may allocate them as
one block. Partitions limit both, and cost a few fused kernels at each cut.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

from onnx import GraphProto, ModelProto, ValueInfoProto

from fusion_edge.export.engines.graph_values import inferred_values
from fusion_edge.export.engines.linear_pieces import block_bytes, stored_bytes
from fusion_edge.kernels.onnx_functions.alignment import ADD_ROWS
from fusion_edge.runtime.bundle.graphs import LLM, VISION_ENCODER
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes

MAX_CROSSING = {LLM: 2, VISION_ENCODER: 4}
"""Most values between two partitions: hidden states and mask, and the sums of the vision encoder's two halves."""
RESIDUAL = ("Add", ADD_ROWS)
"""Nodes that output the hidden states after attention, MLP or an interaction layer."""


def partition_graph(
    model: ModelProto, count: int, max_block: int | None = None, pieces: Collection[str] = ()
) -> list[ModelProto]:
    """Return ``count`` partitions of a model with about equal bytes of weights. There are fewer if it has too few cuts.

    A cut is possible after a residual sum, if at most :data:`MAX_CROSSING` values cross it, and after a piece of a
    linear. The values are outputs of one partition and inputs of later ones. Weights stay in the data file. Nodes must
    be in topological order.

    Args:
        model: The graph.
        count: Number of partitions. There are more if ``max_block`` requires it.
        max_block: Most bytes of :func:`largest_block` of a partition.
        pieces: Names of the MatMuls of :func:`fusion_edge.export.engines.linear_pieces.cut_linears`.

    Raises:
        FusionError: A weight or the nodes between two cuts exceed ``max_block``.
    """
    if max_block is not None:
        _check_weights(model, max_block)
    if count == 1 and (max_block is None or largest_block(model) <= max_block):
        return [model]
    values, crossing = inferred_values(model), _crossing(model)
    places = [place for place in _places(model, crossing, pieces) if values.keys() >= crossing[place - 1]]
    bounds = _bounds(model, places, count, max_block)
    return [_partition(model, values, start, stop, crossing) for start, stop in pairwise(bounds)]


def largest_block(model: ModelProto) -> int:
    """Return the bytes of the largest block for weights: all weights of the model, or one of them in float16."""
    weights = model.graph.initializer
    return max(sum(map(stored_bytes, weights)), *map(block_bytes, weights), 0)


def _check_weights(model: ModelProto, max_block: int) -> None:
    """Raise :class:`FusionError` for a weight that exceeds ``max_block``."""
    for tensor in model.graph.initializer:
        if (size := block_bytes(tensor)) > max_block:
            raise FusionError(
                f"{tensor.name} needs a block of {format_bytes(size)} and cannot be cut; --max-block is "
                f"{format_bytes(max_block)}. {_remedy(size)}"
            )


def _remedy(size: int) -> str:
    return f"Build with --max-block {math.ceil(size / 1e6)}MB or more."


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


def _places(model: ModelProto, crossing: Sequence[set[str]], pieces: Collection[str]) -> Iterator[int]:
    """Yield the numbers of nodes behind which the graph can be cut. A sum with a bias is no residual sum."""
    weights, most = {tensor.name for tensor in model.graph.initializer}, MAX_CROSSING.get(model.graph.name, 0)
    for place, (node, names) in enumerate(zip(model.graph.node[:-1], crossing, strict=False), 1):
        is_residual = node.op_type in RESIDUAL and node.output[0] in names and weights.isdisjoint(node.input)
        if node.name in pieces or (is_residual and len(names) <= most):
            yield place


def _bounds(model: ModelProto, places: Sequence[int], count: int, max_block: int | None) -> list[int]:
    """Return where partitions start and end: ``count`` of them, or as many more as ``max_block`` requires."""
    sizes = {tensor.name: stored_bytes(tensor) for tensor in model.graph.initializer}
    nodes = model.graph.node

    def weights(start: int, stop: int) -> int:
        return sum(sizes.get(name, 0) for name in {name for node in nodes[start:stop] for name in node.input})

    before = {place: weights(0, place) for place in places}
    total, most = weights(0, len(nodes)), len(places) + 1
    limit = total if max_block is None else max_block

    def nearest(goal: float) -> int:
        return min(places, key=lambda place: abs(before[place] - goal))

    for number in range(min(count, most), most + 1):
        cuts = places if number == most else {nearest(total * i / number) for i in range(1, number)}
        bounds = [0, *sorted(cuts), len(nodes)]
        largest = max(weights(start, stop) for start, stop in pairwise(bounds))
        if largest <= limit:
            return bounds
    raise FusionError(
        f"{model.graph.name} needs a block of {format_bytes(largest)} between two places where it can be cut, and "
        f"--max-block is {format_bytes(limit)}. {_remedy(largest)}"
    )


def _partition(
    model: ModelProto, values: Mapping[str, ValueInfoProto], start: int, stop: int, crossing: Sequence[set[str]]
) -> ModelProto:
    """Return nodes ``start`` to ``stop`` as a model."""
    graph = model.graph
    nodes = graph.node[start:stop]
    read, made = {name for node in nodes for name in node.input}, {name for node in nodes for name in node.output}
    entering = crossing[start - 1] & read if start else set()
    leaving = crossing[stop - 1] & made if stop < len(graph.node) else set()  # none is an output of the graph
    used = {node.op_type for node in nodes}
    partition = ModelProto()
    partition.CopyFrom(model)
    partition.graph.Clear()
    partition.graph.name = f"{graph.name}.{start}"
    partition.graph.node.extend(nodes)
    partition.graph.input.extend(values[name] for name in sorted(entering))
    partition.graph.input.extend(value for value in graph.input if value.name in read)
    partition.graph.output.extend(value for value in graph.output if value.name in made)
    partition.graph.output.extend(values[name] for name in sorted(leaving))
    partition.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    del partition.functions[:]
    partition.functions.extend(function for function in model.functions if function.name in used)
    _rename(partition.graph, {name: f"{graph.name}.{name}" for name in entering | leaving})
    return partition


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename values: the backend has one memory for a name, and other graphs have values of the same names."""
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
