"""Bytes that attention of one decode step moves, with a KV cache of 16 and of 8 bits, on TensorRT-RTX.

    python -m fusion_edge.benchmarks.kv_cache_formats --device 12.0 --json FILE

Nothing runs: the compiler lists each layer with the types and sizes of its inputs and outputs, which are added up. Only
TensorScatter is corrected: it writes one row in place, and its list has both caches, twice.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fusion_edge.benchmarks.acceptance.engine import BuildLog
from fusion_edge.export.engines.builder import compute_capability
from fusion_edge.export.engines.decompositions import allow_decomposition
from fusion_edge.runtime.backends.tensorrt.library import find_library
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file
from fusion_edge.runtime.system.output_file import write_whole

HEADS, KV_HEADS, DIM, CAPACITY = 24, 8, 128, 4096
OPSET = 24
HALF, FP8, INT8 = TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT8
BYTES = {"Half": 2, "FP8": 1, "Int8": 1, "Float": 4, "Bool": 1, "Int64": 8, "Int32": 4}
LAYER = re.compile(r"^Name: \S+, LayerType: \w+, Inputs: .*$", re.MULTILINE)
VALUE = re.compile(r"Dimensions: \[([\d,]*)\][^{}]*Datatype: (\w+)")


@dataclass(frozen=True)
class Result:
    """What became of one form of cache."""

    form: str
    megabytes: float | None
    """Of all layers; None if it is refused."""
    refusal: str | None = None


class Graph:
    """A graph of attention to a cache, under construction."""

    def __init__(self, cache: int) -> None:
        """``cache`` is the type of the cached keys and values."""
        self.cache = cache
        self.nodes: list[NodeProto] = []
        self.constants = [numpy_helper.from_array(np.array(0.05, np.float16), "scale")]
        if cache != HALF:
            self.constants.append(helper.make_tensor("zero", cache, [], b"\0", raw=True))
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []

    def input(self, name: str, kind: int, *shape: int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, *shape: int) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: str = "int64") -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def quantized(self, x: str) -> str:
        if self.cache == HALF:
            return x
        return self.node("QuantizeLinear", [x, "scale", "zero"], f"{x}.codes")

    def dequantized(self, x: str) -> str:
        if self.cache == HALF:
            return x
        return self.node("DequantizeLinear", [x, "scale", "zero"], f"{x}.values")

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
        allow_decomposition(model)
        return model


def _query(graph: Graph) -> tuple[str, str]:
    query = graph.input("query", HALF, 1, HEADS, 1, DIM)
    return query, graph.input("mask", TensorProto.BOOL, 1, 1, 1, CAPACITY)


def one_layer(cache: int, write: str) -> ModelProto:
    """Return Attention of one query to a cache that the graph updates with the operator ``write``."""
    graph = Graph(cache)
    query, mask = _query(graph)
    updated = [graph.dequantized(_updated(graph, part, write)) for part in ("keys", "values")]
    graph.node("Attention", [query, *updated, mask], "result", scale=DIM**-0.5)
    graph.output("result", HALF, 1, HEADS, 1, DIM)
    return graph.model()


def _updated(graph: Graph, part: str, write: str) -> str:
    """Write one row into the cache, an output of the graph. Returns its name."""
    new = graph.quantized(graph.input(f"new.{part}", HALF, 1, KV_HEADS, 1, DIM))
    rows = CAPACITY - 1 if write == "Concat" else CAPACITY
    past, name = graph.input(f"past.{part}", graph.cache, 1, KV_HEADS, rows, DIM), f"present.{part}"
    if write == "Concat":
        graph.node(write, [past, new], name, axis=2)
    elif write == "TensorScatter":
        graph.node(write, [past, new, graph.input(f"index.{part}", TensorProto.INT64, 1)], name, axis=2)
    else:
        indices = graph.input(f"indices.{part}", TensorProto.INT64, 1, KV_HEADS, 1, 3)
        graph.node(write, [past, indices, new], name)
    graph.output(name, graph.cache, 1, KV_HEADS, CAPACITY, DIM)
    return name


def quantized_attention(is_in_engine: bool) -> ModelProto:
    """Return attention as matrix products of FP8.

    If ``is_in_engine``, the graph appends the new row to its cache. Otherwise the cache is an input alone, keys by
    column; the graph returns the new row, which something else has to store, and attends to it separately.
    """
    graph = Graph(FP8)
    query, mask = _query(graph)
    shape = graph.constant("shape", [1, KV_HEADS, HEADS // KV_HEADS, DIM])
    grouped = graph.node("Reshape", [query, shape], "grouped")
    attending = graph.dequantized(graph.quantized(grouped))
    never = graph.constant("never", -65504.0, "float16")
    if is_in_engine:
        rows = [graph.dequantized(_updated(graph, part, "Concat")) for part in ("keys", "values")]
        columns, values = graph.node("Transpose", rows[:1], "columns", perm=[0, 1, 3, 2]), rows[1]
    else:
        columns = graph.dequantized(graph.input("past.keys", FP8, 1, KV_HEADS, DIM, CAPACITY))
        values = graph.dequantized(graph.input("past.values", FP8, 1, KV_HEADS, CAPACITY, DIM))
    scores = graph.node("MatMul", [attending, columns], "all_scores")
    scores = graph.node("Where", [mask, scores, never], "scores")
    if not is_in_engine:
        new = {part: graph.input(f"new.{part}", HALF, 1, KV_HEADS, 1, DIM) for part in ("keys", "values")}
        for name in new.values():
            graph.output(graph.quantized(name), FP8, 1, KV_HEADS, 1, DIM)
        column = graph.node("Transpose", [new["keys"]], "new_column", perm=[0, 1, 3, 2])
        own = graph.node("MatMul", [grouped, column], "own_score")
        scores = graph.node("Concat", [scores, own], "joined", axis=-1)
    shares = graph.node("Softmax", [scores], "shares", axis=-1)
    if not is_in_engine:
        sizes = graph.constant("sizes", [CAPACITY, 1])
        graph.nodes.append(helper.make_node("Split", [shares, sizes], ["past_shares", "own_share"], axis=-1))
        shares = "past_shares"
    result = graph.node("MatMul", [graph.dequantized(graph.quantized(shares)), values], "attended")
    if not is_in_engine:
        result = graph.node("Add", [result, graph.node("MatMul", ["own_share", new["values"]], "of_own")], "sum")
    graph.output(result, HALF, 1, KV_HEADS, HEADS // KV_HEADS, DIM)
    return graph.model()


FORMS: dict[str, Callable[[], ModelProto]] = {
    "float16, TensorScatter": lambda: one_layer(HALF, "TensorScatter"),
    "FP8, TensorScatter": lambda: one_layer(FP8, "TensorScatter"),
    "INT8, TensorScatter": lambda: one_layer(INT8, "TensorScatter"),
    "FP8, ScatterND": lambda: one_layer(FP8, "ScatterND"),
    "INT8, ScatterND": lambda: one_layer(INT8, "ScatterND"),
    "FP8, Concat": lambda: one_layer(FP8, "Concat"),
    "FP8, Concat, products of FP8": lambda: quantized_attention(is_in_engine=True),
    "FP8, cache updated outside of the engine, products of FP8": lambda: quantized_attention(is_in_engine=False),
}


def measured(form: str, capability: str) -> Result:
    """Compile a form for a compute capability, and add up the bytes of its layers."""
    library = find_library("tensorrt-rtx")
    trt, log = library.module, BuildLog(library)
    logger = log.logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    onnx_parser = trt.OnnxParser(network, logger)
    if not onnx_parser.parse(FORMS[form]().SerializeToString()):
        return Result(form, None, _reason(str(onnx_parser.get_error(0))))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(compute_capability(trt, capability), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if builder.build_serialized_network(network, config) is None:
        return Result(form, None, _reason(log.first_error()))
    count = sum(_bytes(layer) for text in log.texts for layer in LAYER.findall(text))
    if form.endswith("TensorScatter"):
        count -= 4 * KV_HEADS * CAPACITY * DIM * BYTES["Half"]
    return Result(form, round(count / 1e6, 1))


def _bytes(layer: str) -> int:
    return sum(math.prod(map(int, sizes.split(","))) * BYTES[kind] for sizes, kind in VALUE.findall(layer) if sizes)


def _reason(text: str) -> str:
    """Return what TensorRT's message says in brackets."""
    found = re.search(r"API Usage Error \((.*?)(?:\. In | at |$)", text, re.DOTALL)
    return (found[1] if found else text)[:200]


def table(results: Sequence[Result]) -> str:
    """Return the results as Markdown."""
    cells = [f"refused: {one.refusal}" if one.megabytes is None else f"{one.megabytes} MB" for one in results]
    rows = [f"| {one.form} | {cell} |" for one, cell in zip(results, cells, strict=True)]
    return "\n".join(["| cache | moved in a step |", "|---|---|", *rows]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="12.0", metavar="CAPABILITY", help="default: %(default)s")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    results = [measured(form, options.device) for form in FORMS]
    library = find_library("tensorrt-rtx")
    facts = {
        "library": f"{library.name} {library.version}",
        "compute_capability": options.device,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "capacity": CAPACITY},
        "results": [asdict(one) for one in results],
    }
    if options.json is not None:
        path: Path = options.json
        write_whole(path, json.dumps(facts, indent=1) + "\n")
    sys.stdout.write(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
