"""The ONNX Runtime interpreter: FUSION as graphs of ONNX opset 21 and Microsoft's contributed operators.

The graphs use the fastest operators: MatMulNBits for quantized linears (MatMulBnb4 for those with a codebook),
GroupQueryAttention for the LLM, MultiHeadAttention for the vision encoder. Where a CPU kernel fuses several operators,
the graph calls a function (``kernels/onnx_functions/``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import FunctionProto

from fusion_edge.export.lowering.base import OnnxOperations, OnnxValue
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.residual_norm import NORM, fuse_residual_norms
from fusion_edge.kernels.onnx_functions import int8_cache
from fusion_edge.kernels.onnx_functions.activations import swiglu_function
from fusion_edge.kernels.onnx_functions.attention import packed_attention_function, patch_attention_function
from fusion_edge.kernels.onnx_functions.builder import subgraph
from fusion_edge.kernels.onnx_functions.linear import (
    integer_matmul_function,
    integer_mlp_function,
    matmul_nbits_function,
)
from fusion_edge.kernels.operators import MICROSOFT

OPSET = 21  # the newest of ONNX Runtime 1.23, the last release for Python 3.10
BNB4_TYPES = ("fp4", "nf4")  # MatMulBnb4's attribute quant_type is the index
MASKED_SCORE = -1e9  # added to the score of a masked key: its weight becomes exactly 0


class OnnxRuntimeOperations(OnnxOperations):
    """Operations (``export/model/operations.py``) for ONNX Runtime."""

    opset = OPSET
    passes = (fuse_residual_norms,)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._has_any: dict[str, OnnxValue] = {}

    # Weights ------------------------------------------------------------------------------------------------

    def linear(self, x: OnnxValue, name: str, bias: bool = False) -> OnnxValue:
        return self._linear(x, self.linears[name], bias)

    def gelu_mlp(self, x: OnnxValue, name: str) -> OnnxValue:
        up, down = self.linears[f"{name}.up"], self.linears[f"{name}.down"]
        if up.format.quantizes_activations and down.format.quantizes_activations:
            function = integer_mlp_function(OPSET)
            return self._function(function, [x, *self._integer_inputs(up), *self._integer_inputs(down)], name)
        return self._linear(self.linear(x, up.name, bias=True), down, bias=True, of_gelu=True)

    def _linear(self, x: OnnxValue, linear: Linear, bias: bool, of_gelu: bool = False) -> OnnxValue:
        """Apply a linear to ``x``, or to GELU(x) with ``of_gelu``: one function where a CPU kernel fuses both."""
        fmt, name = linear.format, linear.name
        if fmt.quantizes_activations:
            function = integer_matmul_function(OPSET, of_gelu)
            return self._function(function, [x, *self._integer_inputs(linear, bias)], name)
        offset = self.parameter(f"{name}.bias") if bias else None
        if fmt.is_quantized and self._keeps_float16_scales(linear):
            function = matmul_nbits_function(OPSET, of_gelu)
            return self._quantized(x, linear, offset, function)
        if of_gelu:
            x = self._node("FastGelu", [x], domain=MICROSOFT)
        if fmt.is_quantized:
            return self._quantized(x, linear, offset)
        dtype = "float16" if fmt.kind == "fp16" else "float32"
        values = self._plan(linear, "values", dtype, linear.weight.shape)
        result = self._node("FusedMatMul", [x, self._cast(values, dtype)], name, MICROSOFT, transB=1)
        return result if offset is None else result + offset

    def _keeps_float16_scales(self, linear: Linear) -> bool:
        """Whether scales stay float16 beside float32 activations: our function allows that, MatMulNBits does not."""
        is_mixed = (linear.scale_dtype, self.settings.activations) == ("float16", "float32")
        return is_mixed and not linear.format.has_codebook

    def _quantized(
        self, x: OnnxValue, linear: Linear, bias: OnnxValue | None, function: FunctionProto | None = None
    ) -> OnnxValue:
        """Multiply with quantized weights, by ``function`` if it is given, else by ONNX Runtime's operator."""
        fmt, name, rows, columns = linear.format, linear.name, linear.outputs, linear.inputs
        shape = fmt.packed_shape(rows, columns)
        x = self._in_stored_order(x, linear)
        values = self._plan(linear, "values", "uint8", shape)
        scales = self._plan(linear, "scales", linear.scale_dtype, shape[:2])
        inputs: list[OnnxValue | str] = [x, values, scales]
        if fmt.has_codebook:
            inputs[2] = self._cast(scales, linear.scale_dtype)
            sizes = {"K": columns, "N": rows, "block_size": fmt.group_size}
            quant_type = BNB4_TYPES.index(fmt.kind)
            result = self._node("MatMulBnb4", inputs, name, MICROSOFT, **sizes, quant_type=quant_type)
            return result if bias is None else result + bias
        if not fmt.is_symmetric:
            groups = (rows, -(-shape[1] * fmt.bits // 8))
            inputs.append(self._plan(linear, "zero_points", "uint8", groups))
        elif bias is not None:
            inputs.append("")
        if bias is not None:
            inputs += ["", bias]  # no group indices
        attributes = {
            "K": columns,
            "N": rows,
            "bits": fmt.bits,
            "block_size": fmt.block_size,
            "accuracy_level": self.settings.accuracy_level,
        }
        if function is not None:
            return self._function(function, inputs, name, **attributes)
        inputs[2] = self._cast(scales, linear.scale_dtype)
        return self._node("MatMulNBits", inputs, name, MICROSOFT, **attributes)

    def _integer_inputs(self, linear: Linear, bias: bool = True) -> list[OnnxValue | str]:
        """Return the inputs ``operators.INTEGER_LINEAR_INPUTS`` of a linear with 8-bit weights and activations."""
        rows = linear.outputs
        return [
            self._plan(linear, "values", "int8", linear.weight.shape),
            self._plan(linear, "scales", "float16", (rows,)),
            self._plan(linear, "input_scale", "float32", ()),
            self._plan(linear, "input_zero_point", "uint8", ()),
            self.parameter(f"{linear.name}.bias").name if bias else self.builder.constant(np.zeros(rows), "float32"),
        ]

    # Norms and activation functions -------------------------------------------------------------------------

    def rms_norm(self, x: OnnxValue, name: str, eps: float) -> OnnxValue:
        inputs = [x, self.parameter(f"{name}.weight")]
        return self._node(NORM, inputs, name, axis=-1, epsilon=eps, stash_type=1)

    def swiglu(self, gate: OnnxValue, up: OnnxValue) -> OnnxValue:
        return self._function(swiglu_function(OPSET), [gate, up])

    def if_any(self, positions: OnnxValue, then: Callable[[], OnnxValue], otherwise: OnnxValue) -> OnnxValue:
        if positions.name not in self._has_any:
            zero = self.builder.constant(0)
            self._has_any[positions.name] = self._node("Greater", [self._node("Size", [positions]), zero])
        with self.builder.branch() as body:
            computed = then()
        with self.builder.branch() as rest:
            kept = self._node("Identity", [otherwise])
        then_branch, else_branch = subgraph("any", body, [computed.name]), subgraph("none", rest, [kept.name])
        condition = self._has_any[positions.name]
        return self._node("If", [condition], then_branch=then_branch, else_branch=else_branch)

    # Attention ----------------------------------------------------------------------------------------------

    def key_mask(self, patches: OnnxValue, text_mask: OnnxValue) -> OnnxValue:
        pads = self.builder.constant([0, self.config.vision.patches, 0, 0])
        return self._node("Pad", [text_mask, pads, self.builder.constant(1, "int32")])

    def self_attention(self, qkv: OnnxValue, heads: int, key_mask: OnnxValue, patches: int | None) -> OnnxValue:
        if self.settings.activations != "float32":
            return super().self_attention(qkv, heads, key_mask, patches)
        attributes: dict[str, Any] = {"num_heads": heads, "mask_filter_value": MASKED_SCORE}
        if patches is None:
            return self._function(packed_attention_function(OPSET), [qkv, key_mask], **attributes)
        function = patch_attention_function(OPSET)
        return self._function(function, [qkv, key_mask], patches=patches, **attributes)

    def attention(self, q: OnnxValue, k: OnnxValue, v: OnnxValue, heads: int, key_mask: OnnxValue) -> OnnxValue:
        inputs: list[OnnxValue | str] = [q, k, v, "", key_mask]
        return self._node(
            "MultiHeadAttention", inputs, domain=MICROSOFT, num_heads=heads, mask_filter_value=MASKED_SCORE
        )

    def causal_attention(self, qkv: OnnxValue, layer: int) -> OnnxValue:
        language = self.config.language
        cos, sin = (self._rotary_table(name, table) for name, table in (("cos", np.cos), ("sin", np.sin)))
        attributes = {
            "num_heads": language.heads,
            "kv_num_heads": language.kv_heads,
            "scale": language.head_dim**-0.5,
        }
        name = f"llm.layers.{layer}.attention"
        parts = int8_cache.CACHE_TENSORS if self.settings.cache == "int8" else int8_cache.PARTS
        past, present = ([f"{time}.{layer}.{part}" for part in parts] for time in ("past", "present"))
        shared, outputs = ["last_position", "total_length", cos, sin], [name, *present]
        if self.settings.cache == "int8":
            function = int8_cache.attention_function(language.kv_heads, language.head_dim, OPSET)
            attributes |= int8_cache.SCALING
            self.builder.functions[function.name] = function
            inputs = [qkv.name, *past, *shared, "is_prefill"]
            self.builder.node(function.name, inputs, name, function.domain, outputs, **attributes)
            return self.input(name)
        inputs = [qkv.name, "", "", *past, *shared]
        attributes["do_rotary"] = 1
        self.builder.node("GroupQueryAttention", inputs, name, MICROSOFT, outputs, **attributes)
        return self.input(name)
