"""Single operators in the forms that the exporter writes, with random values and their results in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from fusion_edge.benchmarks.acceptance.alignment import alignment_case
from fusion_edge.benchmarks.acceptance.comparison import ROUNDING
from fusion_edge.benchmarks.acceptance.engine import OperatorCase
from fusion_edge.benchmarks.acceptance.quantized_kv_cache_graph import dequantized, quantized, quantized_cache_attention
from fusion_edge.export.lowering.tensorrt import OPSET
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.kernels.tensorrt_plugins import Plugin, use_plugins
from fusion_edge.kernels.triton.ahead_of_time import CONTEXT_ROWS

IR_VERSION = 10
BASIC_OPSET = 21
"""TensorRT 10.3 reads it."""
CAPACITY, HEADS = 1024, 32

Array = npt.NDArray[Any]


def gemm(size: int) -> OperatorCase:
    """Return a float16 matrix times the identity, as large as the device needs for its throughput."""
    rng = np.random.default_rng(0)
    inputs = {
        "a": rng.standard_normal((size, size), np.float32).astype(np.float16),
        "b": np.eye(size, dtype=np.float16),
    }
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    return OperatorCase(
        _model([node], inputs, {"y": (size, size)}, (), BASIC_OPSET), inputs, {"y": inputs["a"].astype(np.float64)}
    )


def attention(dim: int, rows: int, length: int, heads: int = HEADS) -> OperatorCase:
    """Return causal attention of ``rows`` tokens, the last of ``length``, with heads of ``dim``."""
    rng = np.random.default_rng(0)
    shapes = {"q": (1, heads, rows, dim), "k": (1, heads, length, dim), "v": (1, heads, length, dim)}
    inputs: dict[str, Array] = {
        name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()
    }
    mask = np.tril(np.ones((length, length), bool))[None, None, length - rows :]
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"], scale=dim**-0.5)
    model = _model([node], inputs | {"mask": mask}, {"y": shapes["q"]}, (), OPSET)
    q, k, v = (inputs[name].astype(np.float64) for name in shapes)
    scores = np.where(mask, q @ k.swapaxes(2, 3) * dim**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    # Scores rounded to float16 change a weight by their rounding; weights and their sum round, too.
    largest_score = np.abs(scores, where=np.isfinite(scores), out=np.zeros_like(scores)).max()
    tolerance = ROUNDING * (2 * largest_score + 3) * np.abs(weights @ np.abs(v)).max()
    return OperatorCase(model, inputs | {"mask": mask}, {"y": weights @ v}, float(tolerance))


def quantized_kv_cache(
    rows: int, before: int, heads: int = HEADS, dim: int = 96, is_flat: bool = False
) -> OperatorCase:
    """Return attention to an int8 KV cache of ``before`` tokens: a decode step for one row, else a prompt.

    The new rows are inputs in float16, and no outputs: only what attention reads of them is compared. With ``is_flat``
    all tokens get about the same share, of values so small that the products are subnormal in float16.
    """
    rng, is_step = np.random.default_rng(0), rows == 1
    deviations = dict(zip("qkv", (0.01, 1, 0.01) if is_flat else (1, 1, 1), strict=True))

    def random(part: str, count: int) -> npt.NDArray[np.float16]:
        return (deviations[part] * rng.standard_normal((count, heads, dim), np.float32)).astype(np.float16)

    new = {part: random(part, rows) for part in "qkv"}
    past = {part: quantized(random(part, before)) for part in "kv"}
    inputs: dict[str, Array] = {name: array.swapaxes(0, 1)[None].copy() for name, array in new.items()}
    inputs["positions"] = np.arange(before, before + rows)[None]
    counts = {"slots": before if is_step else 0, "prefix": 0 if is_step else before}
    for way, count in counts.items():
        inputs[way] = np.arange(count)
        for name, part in (("key", "k"), ("value", "v")):
            codes, scales = past[part]
            inputs |= {f"{way}.0.{name}": codes[:count], f"{way}.0.{name}_scale": scales[:count]}
    model = quantized_cache_attention(heads, heads, dim)
    del model.graph.output[1:]
    k, v = (np.concatenate([dequantized(*past[part]), dequantized(*quantized(new[part]))]) for part in "kv")
    scores = np.einsum("lhd,thd->hlt", new["q"].astype(np.float64), k) * dim**-0.5
    scores = np.where(np.arange(before + rows) <= np.arange(before, before + rows)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hlt,thd->hld", weights, v)[None]
    # As in attention(); a step's products of elements and their sums may round to float16, too.
    largest_score = np.abs(scores[np.isfinite(scores)]).max()
    sums = np.einsum("hlt,thd->hld", weights, np.abs(v)).max()
    if is_flat:  # roundings of thousands of equal shares are independent, but for that of their sum
        sums = np.abs(expected).max() + 8 * np.sqrt(np.einsum("hlt,thd->hld", weights**2, v**2)).max()
    tolerance = ROUNDING * (8 * largest_score + 3) * sums
    ranges = {name: (size, size, size) for name, size in ({"positions": rows} | counts).items()}
    return OperatorCase(model, inputs, {"result": expected}, float(tolerance), ranges=ranges)


def tensor_scatter(rows: int = 1, at: int = 700, heads: int = HEADS, dim: int = 96) -> OperatorCase:
    """Return an update of a KV cache ``[1,heads,capacity,dim]`` in place."""
    rng = np.random.default_rng(0)
    past, new = (rng.standard_normal((1, heads, size, dim), np.float32).astype(np.float16) for size in (CAPACITY, rows))
    inputs: dict[str, Array] = {"past": past, "new": new, "write_index": np.array([at], np.int64)}
    node = helper.make_node("TensorScatter", list(inputs), ["present"], axis=2)
    expected = past.astype(np.float64)
    expected[:, :, at : at + rows] = new
    model = _model([node], inputs, {"present": past.shape}, (), OPSET)
    return OperatorCase(model, inputs, {"present": expected}, aliases={"present": "past"})


PLUGIN_SHAPES: Mapping[str, Mapping[str, Sequence[int | str]]] = {
    "context_attention": {
        "q": ("questions", "latents", "width"),
        "k": (1, "latents", CONTEXT_ROWS, "width"),
        "v": (1, "latents", CONTEXT_ROWS, "width"),
    },
    "add_layer_norm": {
        "x": ("questions", "latents", "width"),
        "residual": ("questions", "latents", "width"),
        "weight": ("width",),
        "bias": ("width",),
    },
    "add_rows": {
        "x": (1, "length", "width"),
        "positions": ("questions", "latents"),
        "latents": ("questions", "latents", "width"),
        "update": ("questions", "latents", "width"),
    },
}
"""Shapes of the inputs by kernel. ``width`` is constant, the other names are sizes that vary."""
PLUGIN_RANGES = {"questions": (0, 1, 2), "latents": (1, 144, 144), "length": (1, 289, 577)}


def plugin(one: Plugin, questions: int, latents: int, width: int) -> OperatorCase:
    """Return the operator of a plugin in an engine that takes none to many rows."""
    case = alignment_case(one.kernel, questions, latents, width)
    inputs = dict(zip(one.inputs, case.inputs, strict=True))
    shapes = {
        name: [width if size == "width" else size for size in shape]
        for name, shape in PLUGIN_SHAPES[one.kernel].items()
    }
    node = helper.make_node(one.operator, list(inputs), ["output"], domain=DOMAIN)
    model = _model([node], inputs, {"output": shapes[one.inputs[0]]}, (), OPSET, shapes)
    use_plugins(model)
    return OperatorCase(model, inputs, {"output": case.expected}, ranges=PLUGIN_RANGES, uses_plugins=True)


def _model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Sequence[int | str]],
    constants: Sequence[TensorProto],
    opset: int,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
) -> ModelProto:
    """Return a model with inputs of the arrays' types, and of their shapes unless ``shapes`` gives others."""
    described = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), (shapes or {}).get(name, array.shape)
        )
        for name, array in inputs.items()
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "operator", described, results, constants)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
