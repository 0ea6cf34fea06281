"""Single operators in the forms that the exporter writes, with random values and their results in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fusion_edge.benchmarks.acceptance.alignment import alignment_case
from fusion_edge.benchmarks.acceptance.comparison import ROUNDING
from fusion_edge.benchmarks.acceptance.engine import OperatorCase
from fusion_edge.benchmarks.acceptance.quantized_kv_cache_graph import dequantized, quantized, quantized_cache_attention
from fusion_edge.export.lowering import nvfp4
from fusion_edge.export.lowering.tensorrt import OPSET
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.kernels.tensorrt_plugins import Plugin, use_plugins
from fusion_edge.kernels.triton.ahead_of_time import CONTEXT_ROWS
from fusion_edge.quant import float4, float8
from fusion_edge.quant.formats import NVFP4_BLOCK

INPUTS, OUTPUTS = 3072, 8192
"""Of a linear layer of the 3B model."""
IR_VERSION = 10
BASIC_OPSET = 21
"""Has blocked DequantizeLinear and INT4. TensorRT 10.3 reads it."""
CAPACITY, HEADS = 1024, 32
SIGMAS = 6

Array = npt.NDArray[Any]


def quantized_linear(form: str, rows: int, inputs: int, outputs: int) -> OperatorCase:
    """Return ``x [rows,inputs]`` times a quantized weight.

    ``form`` is ``int4-64`` or ``int4-128`` (blocks along the inputs), ``int8`` (one scale an output),
    ``int8-one-scale`` (one for all, then one an output behind the GEMM), ``w8a8``, ``fp8`` or ``nvfp4`` (activations
    quantized, too). There x consists of values that quantization keeps.
    """
    rng = np.random.default_rng(0)
    if form == "nvfp4":
        return _nvfp4(rng, rows, inputs, outputs)
    if form.startswith("int4"):
        x = rng.standard_normal((rows, inputs), np.float32).astype(np.float16)
        nodes, constants, weight = _int4(rng, int(form.removeprefix("int4-")), inputs, outputs)
        return _linear(x, nodes, constants, weight)
    codes, scale = rng.integers(-8, 9, (rows, inputs)), 2.0**-4  # both types hold these integers
    x = (codes * scale).astype(np.float16)
    nodes, constants, weight = (_fp8 if form == "fp8" else _int8)(rng, inputs, outputs)
    if form == "int8":
        return _linear(x, nodes, constants, weight)
    if form == "int8-one-scale":
        return _one_scale(rng, x, outputs)
    kind = TensorProto.FLOAT8E4M3FN if form == "fp8" else TensorProto.INT8
    zero = helper.make_tensor("zero", kind, (), [0])
    pair = ["x", "x_scale", "zero"], ["x_codes", "x_scale", "zero"]
    around = [
        helper.make_node("QuantizeLinear", pair[0], ["x_codes"]),
        helper.make_node("DequantizeLinear", pair[1], ["a"]),
    ]
    scales = numpy_helper.from_array(np.array(scale, np.float16), "x_scale")
    return _linear(x, [*around, *nodes], [*constants, zero, scales], weight, "a")


def _int4(
    rng: np.random.Generator, group: int, inputs: int, outputs: int
) -> tuple[list[NodeProto], list[TensorProto], Array]:
    codes = rng.integers(-8, 8, (inputs, outputs))
    scales = rng.uniform(0.5, 1, (inputs // group, outputs)).astype(np.float16) * np.float16(2.0**-6)
    constants = [
        helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.ravel()),
        numpy_helper.from_array(scales, "scales"),
    ]
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=group)
    return [node], constants, codes * np.repeat(scales.astype(np.float64), group, axis=0)


def _int8(rng: np.random.Generator, inputs: int, outputs: int) -> tuple[list[NodeProto], list[TensorProto], Array]:
    codes = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    scales = (rng.uniform(0.5, 1, outputs) * 2.0**-10).astype(np.float16)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["by_row"], axis=0),
        helper.make_node("Transpose", ["by_row"], ["w"], perm=[1, 0]),
    ]
    constants = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    return nodes, constants, (codes * scales.astype(np.float64)[:, None]).T


def _one_scale(rng: np.random.Generator, x: Array, outputs: int) -> OperatorCase:
    codes, scale = rng.integers(-127, 128, (outputs, x.shape[1])).astype(np.int8), np.float16(2.0**-10)
    channels = rng.uniform(0.5, 1, outputs).astype(np.float16)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["by_row"]),
        helper.make_node("Transpose", ["by_row"], ["w"], perm=[1, 0]),
    ]
    arrays = {"codes": codes, "scale": np.array(scale), "channels": channels}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    weight = (codes * float(scale) * channels.astype(np.float64)[:, None]).T
    return _linear(x, nodes, constants, weight, channels="channels")


def _fp8(rng: np.random.Generator, inputs: int, outputs: int) -> tuple[list[NodeProto], list[TensorProto], Array]:
    codes, scale = rng.integers(-8, 9, (inputs, outputs)), np.float16(2.0**-7)
    constants = [
        helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, codes.shape, codes.ravel().astype(np.float32)),
        numpy_helper.from_array(np.array(scale), "scale"),
    ]
    return [helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"])], constants, codes * float(scale)


def _nvfp4(rng: np.random.Generator, rows: int, inputs: int, outputs: int) -> OperatorCase:
    """Return the functions of a bundle, which ``use_fp4`` replaces. Each block of x has the largest FP4 value."""

    def factors(count: int, tensor_scale: float) -> Array:
        """Return scales of blocks, 0.5 to 1.875: E4M3 times ``tensor_scale``."""
        scales: Array = rng.choice(float8.VALUES[0x30:0x40], (count, inputs // NVFP4_BLOCK)) * np.float32(tensor_scale)
        return scales

    def scaled(codes: Array, scales: Array) -> Array:
        return (float4.VALUES[codes].reshape(*scales.shape, -1) * scales[:, :, None]).reshape(len(codes), -1)

    of_x, of_weight = 2.0**-4, 2.0**-10
    codes = rng.integers(0, 16, (rows, inputs), np.uint8)
    codes[:, ::NVFP4_BLOCK] = float4.encode(np.array(float4.LARGEST, np.float32))
    x = scaled(codes, factors(rows, of_x)).astype(np.float16)
    codes, scales = rng.integers(0, 16, (outputs, inputs), np.uint8), factors(outputs, of_weight)
    packed, stored = codes[:, ::2] | codes[:, 1::2] << 4, float8.encode((scales / of_weight).astype(np.float32))
    constants = [
        helper.make_tensor("codes", TensorProto.UINT4, codes.shape, packed.tobytes(), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT8E4M3FN, stored.shape, stored.tobytes(), raw=True),
        numpy_helper.from_array(np.array(of_x, np.float32), "x_scale"),
        numpy_helper.from_array(np.array(of_weight, np.float32), "scale"),
    ]
    nodes = [
        helper.make_node(nvfp4.QUANTIZE, ["x", "x_scale"], ["a"], "quantize", domain=DOMAIN),
        helper.make_node(nvfp4.DEQUANTIZE, ["codes", "scales", "scale"], ["by_row"], "dequantize", domain=DOMAIN),
        helper.make_node("Transpose", ["by_row"], ["w"], perm=[1, 0]),
    ]
    case = _linear(x, nodes, constants, scaled(codes, scales).T.astype(np.float64), "a")
    case.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    functions = nvfp4.quantize_function(BASIC_OPSET), nvfp4.dequantize_function(BASIC_OPSET)
    case.model.functions.extend(functions)
    return case


def _linear(
    x: Array,
    nodes: Sequence[NodeProto],
    constants: Sequence[TensorProto],
    weight: Array,
    activations: str = "x",
    channels: str | None = None,
) -> OperatorCase:
    """Return the case of ``x @ weight``, whose outputs are multiplied by the constant ``channels``.

    The tolerance covers weights rounded to float16 and, at worst, sums in float16: each rounds by 2^-11 of a partial
    sum, and tensor cores round once for 16 terms. Errors of random signs add up as a random walk.
    """
    outputs = weight.shape[1]
    gemm = [helper.make_node("MatMul", [activations, "w"], ["y" if channels is None else "product"])]
    if channels is not None:
        gemm.append(helper.make_node("Mul", ["product", channels], ["y"]))
    model = _model(
        [*nodes, *gemm],
        {"x": x},
        {"y": (len(x), outputs)},
        constants,
        BASIC_OPSET,
    )
    wide = x.astype(np.float64)
    walk = np.sqrt((wide**2) @ (weight**2)).max() * ROUNDING * np.sqrt(1 + len(weight) / 16)
    return OperatorCase(model, {"x": x}, {"y": wide @ weight}, SIGMAS * float(walk))


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
