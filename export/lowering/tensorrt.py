"""The TensorRT interpreter: FUSION as graphs of standard operators of ONNX opset 24.

TensorRT 10.15 and TensorRT-RTX have native layers for RMSNormalization, RotaryEmbedding, Attention, and TensorScatter,
which updates the KV cache in place. Weights with 4 and 8 bits are constants behind DequantizeLinear, which TensorRT
fuses with the GEMM that reads them. The operators of the recursive alignment are model-local functions, which a plugin
may replace (``kernels/tensorrt_plugins.py``). ONNX Runtime computes the same graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto

from fusion_edge.export.lowering import nvfp4
from fusion_edge.export.lowering.base import OnnxValue
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.quantized_kv_cache import QuantizedKvCacheOperations
from fusion_edge.kernels.onnx_functions import alignment
from fusion_edge.kernels.onnx_functions.builder import qualify_names
from fusion_edge.runtime.bundle.graphs import TensorSpec

OPSET = 24  # the first with TensorScatter
STEP = 2.0**-12
"""Scale of all 8-bit weights of the LLM in its GEMMs: exact in float16, and near the usual scales of channels."""
EIGHT_BITS = {"int8": "int8", "w8a8": "int8", "fp8": "float8_e4m3fn"}
"""Types of stored weights, by kind."""


class TensorRTOperations(QuantizedKvCacheOperations):
    """Operations (``model/operations.py``) for TensorRT. A Reshape of a value that may be empty infers no size."""

    opset = OPSET
    stores_int4_by_column = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._mask: OnnxValue | None = None

    def _function(
        self, function: FunctionProto, inputs: Sequence[OnnxValue | str], scope: str = "", **attributes: Any
    ) -> OnnxValue:
        return super()._function(qualify_names(function), inputs, scope, **attributes)

    # Weights ------------------------------------------------------------------------------------------------

    def linear(self, x: OnnxValue, name: str, bias: bool = False) -> OnnxValue:
        linear = self.linears[name]
        fmt = linear.format
        if fmt.kind == "nvfp4":
            x, values = self._nvfp4(x, linear)
        elif fmt.bits == 4:
            x = self._in_stored_order(x, linear)
            values = self._int4(linear)
        elif fmt.is_weight_only_8_bit and name.startswith("llm."):
            result = self._scaled_by_channel(x, linear)
            return result + self.parameter(f"{name}.bias") if bias else result
        elif fmt.is_quantized:
            x = self._quantized_activations(x, linear) if fmt.quantizes_activations else x
            values = self._transposed(self._dequantized_by_row(linear))
        else:
            dtype = "float16" if fmt.kind == "fp16" else "float32"
            stored_values = self._plan(linear, "values", dtype, linear.weight.shape)
            values = self._transposed(self.input(self._cast(stored_values, dtype)))
        result = self._node("MatMul", [x, values], name)
        return result + self.parameter(f"{name}.bias") if bias else result

    def _transposed(self, weight: OnnxValue) -> OnnxValue:
        """Transpose ``[N,K]`` -> ``[K,N]``; TensorRT fuses it into the GEMM."""
        return self._node("Transpose", [weight], f"{weight.name}.by_column", perm=[1, 0])

    def _int4(self, linear: Linear) -> OnnxValue:
        """Dequantize ``[K,N]`` in blocks along K: the layout of TensorRT's weight-only INT4 GEMM."""
        rows, columns, fmt = linear.outputs, linear.inputs, linear.format
        values = self._plan(linear, "values", "int4", (columns, rows), by_column=True)
        scales = self._plan(linear, "scales", "float16", (fmt.blocks(columns), rows), by_column=True)
        inputs: list[OnnxValue | str] = [values, self._cast(scales, "float16")]
        return self._node("DequantizeLinear", inputs, linear.weight.name, axis=0, block_size=fmt.block_size)

    def _nvfp4(self, x: OnnxValue, linear: Linear) -> tuple[OnnxValue, OnnxValue]:
        """Quantize inputs, and dequantize weights ``[K,N]``: functions that ``export/engines/nvfp4.py`` replaces."""
        rows, columns = linear.weight.shape
        values = self._plan(linear, "values", "uint4", (rows, columns))
        scales = self._plan(linear, "scales", "float8_e4m3fn", (rows, linear.format.blocks(columns)))
        whole, inputs = (self._plan(linear, part, "float32", ()) for part in ("tensor_scale", "input_scale"))
        weight = self._function(nvfp4.dequantize_function(OPSET), [values, scales, whole], linear.weight.name)
        x = self._function(nvfp4.quantize_function(OPSET), [x, inputs], f"{linear.name}.input")
        return x, self._transposed(weight)

    def _scaled_by_channel(self, x: OnnxValue, linear: Linear) -> OnnxValue:
        """Multiply by 8-bit weights with one scale for all, then scale the channels of the result.

        TensorRT-RTX fuses this form with the GEMV of a decode step. With a scale for each channel it dequantizes all
        weights first, which moves five times their bytes.
        """
        values = self._plan(linear, "values", EIGHT_BITS[linear.format.kind], linear.weight.shape)
        scales = self._plan(linear, "scales", "float16", (linear.outputs,))
        step = self.builder.constant(STEP, "float16")
        weight = self._transposed(self._node("DequantizeLinear", [values, step], linear.weight.name))
        # The square root of 1 / STEP at a time: neither the products nor the scales leave float16's range.
        root = self.builder.constant(STEP**-0.5, "float16")
        channels = self._node("Mul", [self._cast(scales, "float16"), root], f"{linear.name}.channels")
        return self._node("Mul", [self._node("MatMul", [x, weight], linear.name) * channels, root], linear.name)

    def _dequantized_by_row(self, linear: Linear) -> OnnxValue:
        """Dequantize ``[N,K]`` of 8 bits with one scale per row."""
        values = self._plan(linear, "values", EIGHT_BITS[linear.format.kind], linear.weight.shape)
        scales = self._plan(linear, "scales", "float16", (linear.outputs,))
        inputs: list[OnnxValue | str] = [values, self._cast(scales, "float16")]
        return self._node("DequantizeLinear", inputs, linear.weight.name, axis=0)

    def _quantized_activations(self, x: OnnxValue, linear: Linear) -> OnnxValue:
        """Quantize and dequantize inputs, int8 with zero point 0: TensorRT supports no other."""
        scale = self._plan(linear, "input_scale", "float16", ())
        parameters: list[OnnxValue | str] = [self._cast(scale, "float16"), self.builder.constant(0, "int8")]
        quantized = self._node("QuantizeLinear", [x, *parameters], f"{linear.name}.input")
        return self._node("DequantizeLinear", [quantized, *parameters], f"{linear.name}.input")

    # Norms and activation functions -------------------------------------------------------------------------

    def rms_norm(self, x: OnnxValue, name: str, eps: float) -> OnnxValue:
        weight = self.parameter(f"{name}.weight")
        return self._node("RMSNormalization", [x, weight], name, axis=-1, epsilon=eps, stash_type=1)

    def add_layer_norm(self, x: OnnxValue, residual: OnnxValue, name: str, eps: float) -> OnnxValue:
        inputs = [x, residual, self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")]
        return self._function(alignment.add_layer_norm_function(eps, OPSET), inputs, name)

    def swiglu(self, gate: OnnxValue, up: OnnxValue) -> OnnxValue:
        return gate * self._node("Sigmoid", [gate]) * up

    def if_any(self, positions: OnnxValue, then: Callable[[], OnnxValue], otherwise: OnnxValue) -> OnnxValue:
        """Return ``then()`` always: kernels of empty tensors are not launched, and a branch would prevent fusions."""
        return then()

    def put_rows(self, x: OnnxValue, positions: OnnxValue, rows: OnnxValue, update: OnnxValue) -> OnnxValue:
        return self._function(alignment.add_rows_function(OPSET), [x, positions, rows, update])

    # Attention ----------------------------------------------------------------------------------------------

    def key_mask(self, patches: OnnxValue, text_mask: OnnxValue) -> OnnxValue:
        """Return the attention mask ``[N,1,1,P+T]`` bool."""
        crops = self._node("Shape", [text_mask], start=0, end=1)
        shape = self.concat([crops, self.input(self.builder.constant([self.config.vision.patches]))], axis=0)
        ones = self._node("Expand", [self.builder.constant([[True]], "bool"), shape])
        text = self._node("Greater", [text_mask, self.builder.constant(0, "int32")])
        return self._node("Unsqueeze", [self.concat([ones, text], axis=1), self.builder.constant([1, 2])])

    def attention(self, q: OnnxValue, k: OnnxValue, v: OnnxValue, heads: int, key_mask: OnnxValue) -> OnnxValue:
        width = self.config.vision.width
        parts = [self._heads(x, heads, width // heads) for x in (q, k, v)]
        one = self.input(self.builder.constant([1]))
        rows = self.concat([one, one, self._node("Shape", [q], start=1, end=2), one], axis=0)
        mask = self._node("Expand", [key_mask, rows])  # ONNX Runtime does not broadcast the mask over queries
        attended = self._node("Attention", [*parts, mask], scale=(width // heads) ** -0.5)
        return self._joined(attended, width)

    def _heads(self, x: OnnxValue, heads: int, dim: int) -> OnnxValue:
        """Split heads: ``[B,L,heads*dim]`` -> ``[B,heads,L,dim]``."""
        return self._node("Transpose", [self._reshape(x, 0, 0, heads, dim)], perm=[0, 2, 1, 3])

    def _joined(self, x: OnnxValue, width: int) -> OnnxValue:
        """Join heads: ``[B,heads,L,dim]`` -> ``[B,L,width]``."""
        return self._reshape(self._node("Transpose", [x], perm=[0, 2, 1, 3]), 0, 0, width)

    def causal_attention(self, qkv: OnnxValue, layer: int) -> OnnxValue:
        language, name = self.config.language, f"llm.layers.{layer}.attention"
        heads, dim = (language.heads, language.kv_heads, language.kv_heads), language.head_dim
        sizes = self.builder.constant([count * dim for count in heads])
        parts = self.builder.node("Split", [qkv.name, sizes], outputs=3, axis=-1)
        q, k, v = (self._heads(self.input(part), count, dim) for part, count in zip(parts, heads, strict=True))
        tables = [self._rotary_table("cos", np.cos), self._rotary_table("sin", np.sin)]
        q, k = (self._node("RotaryEmbedding", [x, *tables, "positions"], name) for x in (q, k))
        if self.settings.cache == "int8":
            joined = self._joined(self.quantized_cache_attention(q, k, v, layer), language.heads * dim)
            self.describe_attention(joined)
            return joined
        keys, values = (self._cached(f"{layer}.{part}", new) for part, new in (("key", k), ("value", v)))
        attended = self._node("Attention", [q, keys, values, self._causal_mask()], name, scale=dim**-0.5)
        return self._joined(attended, language.heads * dim)

    def _cached(self, name: str, new: OnnxValue) -> OnnxValue:
        """Write the new tokens' rows into the cache ``past.{name}`` at ``write_index``. Return its first ``slots``.

        TensorScatter requires a cache of a fixed capacity, so attention reads a slice of it: a step of a short sequence
        does not read the rest.
        """
        present = f"present.{name}"
        inputs = [f"past.{name}", new.name, "write_index"]
        self.builder.node("TensorScatter", inputs, present, outputs=[present], axis=2)
        count = self._node("Shape", ["slots"])  # one for each cache: engines are cut between layers
        start, axis = self.builder.constant([0]), self.builder.constant([2])
        used, language = self._node("Slice", [present, start, count, axis], f"{present}.used"), self.config.language
        shape = (1, language.kv_heads, "slots", language.head_dim)
        self.builder.described.append(TensorSpec(used.name, self.settings.activations, shape))
        return used

    def _causal_mask(self) -> OnnxValue:
        """Return the mask ``[1,1,L,slots]`` bool of cache slots that a token attends to; one for all layers."""
        if self._mask is None:
            rows = self._node("Unsqueeze", ["positions", self.builder.constant([1, 3])])
            self._mask = self._node("LessOrEqual", ["slots", rows], "llm.causal_mask")
            self.builder.described.append(TensorSpec(self._mask.name, "bool", (1, 1, "positions", "slots")))
        return self._mask
