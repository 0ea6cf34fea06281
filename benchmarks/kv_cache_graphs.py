"""Graphs of attention of one decoder layer to a KV cache of 16 or 8 bits: what :mod:`.kv_cache_formats` compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fusion_edge.benchmarks.acceptance.quantized_kv_cache_graph import quantized_cache_attention
from fusion_edge.export.engines.decompositions import allow_decomposition, use_attention
from fusion_edge.export.engines.optimization_profiles import DimensionRanges
from fusion_edge.kernels.onnx_functions.masked_attention import BLOCKED

CAPACITY, WINDOW, PROMPT = 4096, 1024, 921
"""Tokens of the cache, of the start of it that a decode step reads, and of a usual prompt."""
OPSET = 24
HALF, FP8, INT8 = TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT8
IN_PLACE = "TensorScatter"
AS_BUILT = "INT8, as --kv-cache int8 builds it"
FIRST = f", first {WINDOW:,} tokens"


@dataclass(frozen=True)
class Heads:
    """Attention heads of a decoder layer."""

    queries: int
    keys: int
    """Heads of keys, and of values."""
    dim: int

    @property
    def groups(self) -> int:
        """Heads of queries for one of keys."""
        return self.queries // self.keys

    @property
    def row(self) -> int:
        """Keys, or values, of one token."""
        return self.keys * self.dim


@dataclass(frozen=True)
class Form:
    """A graph, and the profiles that it is compiled for; the last one is a decode step."""

    graph: Callable[[Heads], ModelProto]
    profiles: Sequence[DimensionRanges] = field(default=())


class Graph:
    """A graph of attention to a cache, under construction."""

    def __init__(self, cache: int) -> None:
        """``cache`` is the type of the cached keys and values."""
        self.cache = cache
        self.nodes: list[NodeProto] = []
        self.constants = [] if cache == HALF else [helper.make_tensor("zero", cache, [], b"\0", raw=True)]
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []

    def input(self, name: str, kind: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, *shape: int | str) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: str = "int64") -> str:
        if all(one.name != name for one in self.constants):
            self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def reshape(self, x: str, *shape: int) -> str:
        sizes = self.constant("x".join(map(str, shape)), shape)
        return self.node("Reshape", [x, sizes], f"{x}.{sizes}")

    def transpose(self, x: str, *order: int) -> str:
        return self.node("Transpose", [x], f"{x}.by.{''.join(map(str, order))}", perm=order)

    def with_axis(self, x: str, axis: int) -> str:
        return self.node("Unsqueeze", [x, self.constant(f"axis.{axis}", [axis])], f"{x}.with.{axis}")

    def total(self, x: str, axis: int, name: str) -> str:
        return self.node("ReduceSum", [x, self.constant(f"axis.{axis}", [axis])], name, keepdims=0)

    def quantized(self, x: str) -> str:
        return self._converted("QuantizeLinear", x, "codes")

    def dequantized(self, x: str) -> str:
        return self._converted("DequantizeLinear", x, "values")

    def _converted(self, operator: str, x: str, suffix: str) -> str:
        if self.cache == HALF:
            return x
        return self.node(operator, [x, self.constant("scale", 0.05, "float16"), "zero"], f"{x}.{suffix}")

    def masked(self, scores: str, mask: str) -> str:
        return self.node("Where", [mask, scores, self.constant("never", BLOCKED, "float16")], "masked")

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
        allow_decomposition(model)
        return model


# A cache that the engine updates ----------------------------------------------------------------------------------


def updated_inside(heads: Heads, cache: int, write: str, window: int = CAPACITY) -> ModelProto:
    """Return Attention of one query to a cache that the graph updates with the operator ``write``.

    Attention reads the first ``window`` tokens of it.
    """
    graph = Graph(cache)
    query = graph.input("query", HALF, 1, heads.queries, 1, heads.dim)
    mask = graph.input("mask", TensorProto.BOOL, 1, 1, 1, window)
    used = [graph.dequantized(_used(graph, heads, part, write, window)) for part in ("keys", "values")]
    graph.node("Attention", [query, *used, mask], "result", scale=heads.dim**-0.5)
    graph.output("result", HALF, 1, heads.queries, 1, heads.dim)
    return graph.model()


def products_inside(heads: Heads) -> ModelProto:
    """Return attention as matrix products of FP8; the graph appends the new row to its cache."""
    graph = Graph(FP8)
    query = graph.input("query", HALF, 1, heads.queries, 1, heads.dim)
    mask = graph.input("mask", TensorProto.BOOL, 1, 1, 1, CAPACITY)
    attending = graph.dequantized(graph.quantized(graph.reshape(query, 1, heads.keys, heads.groups, heads.dim)))
    keys, values = (graph.dequantized(_used(graph, heads, part, "Concat", CAPACITY)) for part in ("keys", "values"))
    scores = graph.node("MatMul", [attending, graph.transpose(keys, 0, 1, 3, 2)], "scores")
    shares = graph.node("Softmax", [graph.masked(scores, mask)], "shares", axis=-1)
    graph.node("MatMul", [graph.dequantized(graph.quantized(shares)), values], "result")
    graph.output("result", HALF, 1, heads.keys, heads.groups, heads.dim)
    return graph.model()


def _used(graph: Graph, heads: Heads, part: str, write: str, window: int) -> str:
    """Write one row into the cache, an output of the graph. Return the name of its first ``window`` tokens."""
    shape = heads.keys, CAPACITY, heads.dim
    new = graph.quantized(graph.input(f"new.{part}", HALF, 1, heads.keys, 1, heads.dim))
    rows = CAPACITY - 1 if write == "Concat" else CAPACITY
    past, name = graph.input(f"past.{part}", graph.cache, 1, heads.keys, rows, heads.dim), f"present.{part}"
    if write == "Concat":
        graph.node(write, [past, new], name, axis=2)
    elif write == IN_PLACE:
        graph.node(write, [past, new, graph.input(f"index.{part}", TensorProto.INT64, 1)], name, axis=2)
    else:
        indices = graph.input(f"indices.{part}", TensorProto.INT64, 1, heads.keys, 1, 3)
        graph.node(write, [past, indices, new], name)
    graph.output(name, graph.cache, 1, *shape)
    if window == CAPACITY:
        return name
    bounds = [graph.constant(f"axis.{value}", [value]) for value in (0, window, 2)]
    return graph.node("Slice", [name, *bounds], f"{name}.used")


# A cache that something else updates, with the rows that the engine returns ---------------------------------------


def read_by_attention(heads: Heads) -> ModelProto:
    """Return Attention to a cache of FP8, an input alone, and to the new row. The graph returns the row's codes."""
    graph = Graph(FP8)
    query = graph.input("query", HALF, 1, heads.queries, 1, heads.dim)
    mask = graph.input("mask", TensorProto.BOOL, 1, 1, 1, CAPACITY + 1)
    parts = []
    for part in ("keys", "values"):
        past = graph.dequantized(graph.input(f"past.{part}", FP8, 1, heads.keys, CAPACITY, heads.dim))
        new = graph.input(f"new.{part}", HALF, 1, heads.keys, 1, heads.dim)
        graph.output(graph.quantized(new), FP8, 1, heads.keys, 1, heads.dim)
        parts.append(graph.node("Concat", [past, new], f"all.{part}", axis=2))
    graph.node("Attention", [query, *parts, mask], "result", scale=heads.dim**-0.5)
    graph.output("result", HALF, 1, heads.queries, 1, heads.dim)
    return graph.model()


def read_by_products(heads: Heads, quantizes_queries: bool) -> ModelProto:
    """Return attention as matrix products with a cache of FP8, an input alone: keys by column, values by row.

    With ``quantizes_queries``, queries and attention weights are FP8, too.
    """
    graph = Graph(FP8)
    query = graph.input("query", HALF, 1, heads.queries, 1, heads.dim)
    mask = graph.input("mask", TensorProto.BOOL, 1, CAPACITY)
    columns = graph.dequantized(graph.input("past.keys", FP8, heads.keys, heads.dim, CAPACITY))
    values = graph.dequantized(graph.input("past.values", FP8, heads.keys, CAPACITY, heads.dim))
    grouped = graph.reshape(query, heads.keys, heads.groups, heads.dim)
    attending = graph.dequantized(graph.quantized(grouped)) if quantizes_queries else grouped
    scores = graph.masked(graph.node("MatMul", [attending, columns], "past.scores"), mask)
    new = {part: graph.input(f"new.{part}", HALF, 1, heads.keys, 1, heads.dim) for part in ("keys", "values")}
    for name in new.values():
        graph.output(graph.quantized(name), FP8, 1, heads.keys, 1, heads.dim)
    rows = {part: graph.reshape(name, heads.keys, 1, heads.dim) for part, name in new.items()}
    own = graph.node("MatMul", [grouped, graph.transpose(rows["keys"], 0, 2, 1)], "own.scores")
    shares = graph.node("Softmax", [graph.node("Concat", [scores, own], "joined", axis=-1)], "shares", axis=-1)
    sizes = graph.constant("sizes", [CAPACITY, 1])
    graph.nodes.append(helper.make_node("Split", [shares, sizes], ["past.shares", "own.share"], axis=-1))
    weights = graph.dequantized(graph.quantized("past.shares")) if quantizes_queries else "past.shares"
    past = graph.node("MatMul", [weights, values], "of.past")
    graph.node("Add", [past, graph.node("MatMul", ["own.share", rows["values"]], "of.own")], "result")
    graph.output("result", HALF, heads.keys, heads.groups, heads.dim)
    return graph.model()


def read_by_sums(heads: Heads, cache: int) -> ModelProto:
    """Return attention for prompts and for decode steps to a cache by token, ``[tokens,heads*dim]``, an input alone.

    The graph returns the codes of the new tokens' rows, ``[positions,heads*dim]``: one copy stores them. It reads the
    cache in two ways, and a profile leaves one of them empty. A decode step reads the first ``slots`` tokens with
    products of elements and sums, which are fused with the dequantization. A prompt reads the first ``prefix`` tokens
    with matrix products. One scale holds for all tokens and heads.
    """
    graph = Graph(cache)
    query = graph.input("query", HALF, 1, heads.queries, "positions", heads.dim)
    mask = graph.input("mask", TensorProto.BOOL, "positions", "tokens")
    grouped = graph.reshape(query, heads.keys, heads.groups, -1, heads.dim)
    rows = {
        part: graph.input(f"new.{part}", HALF, 1, heads.keys, "positions", heads.dim) for part in ("keys", "values")
    }
    for part, name in rows.items():
        _return_codes(graph, heads, name)
        rows[part] = graph.reshape(name, heads.keys, 1, -1, heads.dim)
    slots, prefix = ({part: _past(graph, heads, way, part) for part in rows} for way in ("slots", "prefix"))
    products = graph.node("Mul", [graph.with_axis(slots["keys"], 2), graph.with_axis(grouped, 3)], "key.products")
    scores = [
        graph.total(products, 4, "slots.scores"),
        _product(graph, grouped, prefix["keys"], "prefix.scores"),
        _product(graph, grouped, rows["keys"], "own.scores"),
    ]
    scores = [graph.masked(graph.node("Concat", scores, "joined", axis=-1), mask)]
    shares = graph.node("Softmax", scores, "shares", axis=-1)
    counts = [graph.node("Shape", [f"{way}.keys"], f"{way}.count", start=0, end=1) for way in ("slots", "prefix")]
    counts.append(graph.node("Shape", [query], "own.count", start=2, end=3))
    parts = ["slots.shares", "prefix.shares", "own.shares"]
    sizes = graph.node("Concat", counts, "sizes", axis=0)
    graph.nodes.append(helper.make_node("Split", [shares, sizes], parts, axis=-1))
    products = graph.node("Mul", [graph.with_axis(slots["values"], 2), graph.with_axis(parts[0], 4)], "value.products")
    results = [
        graph.total(products, 3, "of.slots"),
        graph.node("MatMul", [parts[1], prefix["values"]], "of.prefix"),
        graph.node("MatMul", [parts[2], rows["values"]], "of.own"),
    ]
    graph.node("Add", [graph.node("Add", results[:2], "of.past"), results[2]], "result")
    graph.output("result", HALF, heads.keys, heads.groups, "positions", heads.dim)
    return graph.model()


def _return_codes(graph: Graph, heads: Heads, new: str) -> None:
    """Make codes of the new rows an output, by token."""
    by_token = graph.transpose(graph.reshape(new, heads.keys, -1, heads.dim), 1, 0, 2)
    graph.output(graph.quantized(graph.reshape(by_token, -1, heads.row)), graph.cache, "positions", heads.row)


def _past(graph: Graph, heads: Heads, way: str, part: str) -> str:
    """Return cached keys or values ``[heads,1,tokens,dim]``."""
    codes = graph.input(f"{way}.{part}", graph.cache, way, heads.row)
    values = graph.reshape(graph.dequantized(codes), -1, heads.keys, heads.dim)
    return graph.with_axis(graph.transpose(values, 1, 0, 2), 1)


def _product(graph: Graph, queries: str, keys: str, name: str) -> str:
    return graph.node("MatMul", [queries, graph.transpose(keys, 0, 1, 3, 2)], name)


def as_built(heads: Heads) -> ModelProto:
    """Return attention of a bundle with an int8 cache, as ``fusion-build`` gives it to TensorRT.

    It differs from :func:`read_by_sums` in prompts, which attend with the operator Attention, and has a scale for each
    token and head.
    """
    model = quantized_cache_attention(heads.queries, heads.keys, heads.dim)
    use_attention(model)
    allow_decomposition(model)
    return model


# What is compared -------------------------------------------------------------------------------------------------


def _prompts() -> DimensionRanges:
    return {
        "positions": (1, PROMPT, CAPACITY // 2),
        "slots": (0, 0, 0),
        "prefix": (0, PROMPT, CAPACITY // 2),
        "tokens": (1, 2 * PROMPT, CAPACITY),
    }


def _steps(window: int) -> DimensionRanges:
    sizes: Mapping[str, int] = {"positions": 1, "slots": window, "prefix": 0, "tokens": window + 1}
    return {name: (size, size, size) for name, size in sizes.items()}


def _built(window: int = CAPACITY) -> Form:
    return Form(as_built, (_prompts(), _steps(window)))


def _sums(cache: int, window: int = CAPACITY) -> Form:
    return Form(partial(read_by_sums, cache=cache), (_prompts(), _steps(window)))


FORMS: dict[str, Form] = {
    "float16, TensorScatter": Form(partial(updated_inside, cache=HALF, write=IN_PLACE)),
    f"float16, TensorScatter{FIRST}": Form(partial(updated_inside, cache=HALF, write=IN_PLACE, window=WINDOW)),
    "FP8, TensorScatter": Form(partial(updated_inside, cache=FP8, write=IN_PLACE)),
    "INT8, TensorScatter": Form(partial(updated_inside, cache=INT8, write=IN_PLACE)),
    "FP8, ScatterND": Form(partial(updated_inside, cache=FP8, write="ScatterND")),
    "INT8, ScatterND": Form(partial(updated_inside, cache=INT8, write="ScatterND")),
    "FP8, Concat": Form(partial(updated_inside, cache=FP8, write="Concat")),
    "FP8, Concat, products of FP8": Form(products_inside),
    "FP8, updated outside, Attention": Form(read_by_attention),
    "FP8, updated outside, matrix products of FP8": Form(partial(read_by_products, quantizes_queries=True)),
    "FP8, updated outside, matrix products of float16": Form(partial(read_by_products, quantizes_queries=False)),
    "FP8, updated outside, products and sums": _sums(FP8),
    f"FP8, updated outside, products and sums{FIRST}": _sums(FP8, WINDOW),
    AS_BUILT: _built(),
    f"{AS_BUILT}{FIRST}": _built(WINDOW),
    "float16, updated outside, products and sums": _sums(HALF),
    f"float16, updated outside, products and sums{FIRST}": _sums(HALF, WINDOW),
}
