"""Attention of one layer to the int8 KV cache of TensorRT bundles, as a graph of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from fusion_edge.benchmarks.acceptance.one_layer import one_layer_config
from fusion_edge.export.lowering.base import Settings
from fusion_edge.export.lowering.graph_builder import GraphBuilder
from fusion_edge.export.lowering.tensorrt import OPSET, TensorRTOperations
from fusion_edge.runtime.bundle.graphs import LLM, GraphSpec, TensorSpec, cache_specs


def quantized_cache_attention(heads: int, kv_heads: int, dim: int) -> ModelProto:
    """Return the graph: queries, keys and values ``q``, ``k``, ``v`` ``[1,heads,positions,dim]`` -> ``result``.

    Its other inputs and outputs are those of the LLM of a bundle with ``--target tensorrt --kv-cache int8``.
    """
    config = one_layer_config(heads, kv_heads, dim)
    cache = cache_specs(config, "tensorrt", "int8")
    inputs = [
        *(_rows(name, count, dim) for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))),
        TensorSpec("positions", "int64", (1, "positions")),
    ]
    for way in ("slots", "prefix"):
        inputs.append(TensorSpec(way, "int64", (way,)))
        inputs += [TensorSpec(f"{way}.{spec.name}", spec.dtype, (way, *spec.shape[1:])) for spec in cache]
    new = [TensorSpec(f"new.{spec.name}", spec.dtype, ("positions", *spec.shape[1:])) for spec in cache]
    builder = GraphBuilder(GraphSpec(LLM, tuple(inputs), (_rows("result", heads, dim), *new)), OPSET)
    operations = TensorRTOperations(config, builder, {}, {}, Settings("tensorrt", "float16", 0, "int8", 1))
    q, k, v = (operations.input(name) for name in "qkv")
    operations.output(operations.quantized_cache_attention(q, k, v, 0), "result")
    return builder.model("llm.data", "0")


def quantized(rows: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Return codes ``[tokens,heads,dim]`` and scales ``[tokens,heads]`` of rows ``[tokens,heads,dim]``, in NumPy."""
    wide = rows.astype(np.float32)
    scales = np.maximum(np.abs(wide).max(-1) * np.float32(128 / 127), np.float32(2**-14)).astype(np.float16)
    parts = wide / scales[..., None].astype(np.float32)
    return np.rint(parts * 128).clip(-128, 127).astype(np.int8), scales


def dequantized(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    """Return the values ``[tokens,heads,dim]`` of codes and scales."""
    values: npt.NDArray[Any] = codes.astype(np.float64) / 128 * scales[..., None].astype(np.float64)
    return values


def _rows(name: str, heads: int, dim: int) -> TensorSpec:
    return TensorSpec(name, "float16", (1, heads, "positions", dim))
