"""Cut linears whose weight exceeds a block of memory into pieces of output rows, whose results are concatenated.

TensorRT may allocate a weight as one block, in float16 if it does not multiply with the stored format. On a Jetson with
8 GB a large block fails although enough memory is free; ``lm_head`` is the usual case.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from fusion_edge.export.lowering.nvfp4 import DEQUANTIZE

FLOAT16_BYTES = 2
ROW_MULTIPLE = 64
"""Rows of a piece are a multiple: tiles of GEMMs are, and so pieces start at aligned offsets of the file."""
WEIGHT_OPERATORS = ("DequantizeLinear", DEQUANTIZE, "Transpose", "Cast")
"""Operators between initializers and the MatMul that reads them as a weight."""


def external(tensor: TensorProto) -> dict[str, str]:
    """Return the entries that place an initializer in the data file; empty for one in the graph itself."""
    return {entry.key: entry.value for entry in tensor.external_data}


def stored_bytes(tensor: TensorProto) -> int:
    """Return the bytes of an initializer in the data file."""
    return int(external(tensor).get("length", 0))


def block_bytes(tensor: TensorProto) -> int:
    """Return the bytes of the largest block that TensorRT may allocate for a weight: stored, or in float16."""
    stored = stored_bytes(tensor)
    return max(stored, FLOAT16_BYTES * math.prod(tensor.dims)) if stored else 0


@dataclass(frozen=True)
class Columns:
    """Columns of a matrix in the data file, which are not contiguous there."""

    location: str
    """Name of the file."""
    offset: int
    """Start of the matrix in the file, in bytes."""
    rows: int
    row_bytes: int
    start: int
    """First byte of the columns in each row."""
    stop: int

    def read(self, folder: Path) -> bytes:
        """Return the columns, row by row."""
        matrix = np.memmap(folder / self.location, np.uint8, "r", self.offset, (self.rows, self.row_bytes))
        return matrix[:, self.start : self.stop].tobytes()


@dataclass(frozen=True)
class Pieces:
    """What :func:`cut_linears` has cut."""

    matmuls: frozenset[str] = frozenset()
    """Names of the MatMul nodes of all pieces."""
    columns: Mapping[str, Columns] = field(default_factory=dict)
    """Content of the initializers that are no range of the data file, by name."""

    def filled(self, model: ModelProto, folder: Path) -> ModelProto:
        """Return a model with the content of its :attr:`columns`, read from the data file in ``folder``."""
        filled = ModelProto()
        filled.CopyFrom(model)
        for tensor in filled.graph.initializer:
            if tensor.name in self.columns:
                tensor.raw_data = self.columns[tensor.name].read(folder)
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
        return filled


@dataclass(frozen=True)
class _Weight:
    """The weight of a MatMul: initializers, and the nodes that make ``[K,N]`` of them."""

    nodes: tuple[NodeProto, ...]
    initializers: tuple[TensorProto, ...]

    @property
    def matrix(self) -> TensorProto:
        return max(self.initializers, key=stored_bytes)

    @property
    def axis(self) -> int:
        """Axis of the outputs in every initializer."""
        return 0 if any(node.op_type == "Transpose" for node in self.nodes) else -1

    @property
    def outputs(self) -> int:
        return int(self.matrix.dims[self.axis])

    def rows(self, max_block: int) -> int | None:
        """Return the outputs of each piece, all but the last of equal size. None: the weight stays whole."""
        if block_bytes(self.matrix) <= max_block:
            return None
        most = max_block // (block_bytes(self.matrix) // self.outputs) // ROW_MULTIPLE * ROW_MULTIPLE
        if not 0 < most < self.outputs:
            return None
        count = math.ceil(self.outputs / most)
        return math.ceil(self.outputs / count / ROW_MULTIPLE) * ROW_MULTIPLE


def cut_linears(model: ModelProto, max_block: int) -> Pieces:
    """Replace each linear whose weight exceeds ``max_block`` bytes by linears of fewer outputs and a Concat.

    A weight counts as :func:`block_bytes`. It stays whole if :data:`ROW_MULTIPLE` of its rows exceed the limit. Data
    stay where they are: a piece of a ``[N,K]`` weight is a range of the data file, one of ``[K,N]`` is in
    :attr:`Pieces.columns` until :meth:`Pieces.filled`.
    """
    find = _weights(model)
    nodes: list[NodeProto] = []
    pieces: dict[str, TensorProto] = {}
    columns: dict[str, Columns] = {}
    matmuls: set[str] = set()
    for node in model.graph.node:
        weight = find(node)
        rows = None if weight is None else weight.rows(max_block)
        if weight is None or rows is None:
            nodes.append(node)
            continue
        own = {name for one in weight.nodes for name in one.output}
        nodes = [one for one in nodes if not own.intersection(one.output)]
        results = []
        for start in range(0, weight.outputs, rows):
            suffix, stop = f".rows{start}", min(start + rows, weight.outputs)
            own |= {tensor.name for tensor in weight.initializers if tensor.dims}
            for tensor in weight.initializers:
                if tensor.dims:
                    piece, content = _slice(tensor, weight.axis, start, stop)
                    piece.name = tensor.name + suffix
                    pieces[piece.name] = piece
                    columns |= {} if content is None else {piece.name: content}
            nodes += [_renamed(one, own | {*node.output}, suffix) for one in (*weight.nodes, node)]
            matmuls.add(nodes[-1].name)
            results.append(nodes[-1].output[0])
        nodes.append(helper.make_node("Concat", results, [*node.output], name=f"{node.name}.Concat", axis=-1))
    _replace(model, nodes, pieces.values())
    return Pieces(frozenset(matmuls), columns)


def _weights(model: ModelProto) -> Callable[[NodeProto], _Weight | None]:
    """Return a function that finds the weight of a node. None: it has none, or shares its nodes with another."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)

    def collect(name: str, nodes: list[NodeProto], found: list[TensorProto]) -> bool:
        """Add the nodes and initializers that ``name`` is made of, in order. Return whether there is nothing else."""
        if name in initializers:
            found.append(initializers[name])
            return bool(external(found[-1])) or not found[-1].dims
        maker = makers.get(name)
        if maker is None or maker.op_type not in WEIGHT_OPERATORS or readers[name] > 1:
            return False
        if not all(collect(one, nodes, found) for one in maker.input):
            return False
        nodes.append(maker)
        return True

    def find(node: NodeProto) -> _Weight | None:
        nodes: list[NodeProto] = []
        found: list[TensorProto] = []
        if node.op_type != "MatMul" or not collect(node.input[1], nodes, found):
            return None
        return _Weight(tuple(nodes), tuple(found))

    return find


def _slice(tensor: TensorProto, axis: int, start: int, stop: int) -> tuple[TensorProto, Columns | None]:
    """Return outputs ``start`` to ``stop`` of an initializer, and its content if that is not a range of the file."""
    piece, place = TensorProto(), external(tensor)
    piece.CopyFrom(tensor)
    outputs, at, size = tensor.dims[axis], int(place["offset"]), stored_bytes(tensor)
    piece.dims[axis] = stop - start
    first, last = size * start // outputs, size * stop // outputs
    content = None
    if axis:
        rows = tensor.dims[0]
        content = Columns(place["location"], at, rows, size // rows, first // rows, last // rows)
    for entry in piece.external_data:
        if entry.key in ("offset", "length"):
            entry.value = str(at + first if entry.key == "offset" else last - first)
    return piece, content


def _renamed(node: NodeProto, names: Container[str], suffix: str) -> NodeProto:
    """Return a copy of a node with ``suffix`` behind its own name and those of ``names`` that it reads and writes."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name += suffix
    for values in (copy.input, copy.output):
        values[:] = [name + suffix if name in names else name for name in values]
    return copy


def _replace(model: ModelProto, nodes: Sequence[NodeProto], pieces: Iterable[TensorProto]) -> None:
    """Set a model's nodes, add initializers, and remove those that no node reads."""
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in (*model.graph.initializer, *pieces) if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
