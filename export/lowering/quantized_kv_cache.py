"""Attention of the TensorRT interpreter to an int8 KV cache that graphs only read.

TensorScatter takes no 8 bits, so no graph writes this cache: it returns the new tokens' rows, which the runtime stores.
Every token and head has a scale, made in the graph from its largest magnitude. All queries read quantized keys and
values, those of their own prompt too, so a prompt and decode steps give the same logits, but for rounding.

The graph reads the cache in two ways, and a run leaves one of them empty:

- A prompt reads the first ``prefix`` tokens, dequantized. ``fusion-build`` makes this the operator Attention, for which
  TensorRT has kernels.
- A decode step reads ``slots`` with products of elements and sums. TensorRT-RTX fuses them with the dequantization; a
  dequantized cache for Attention would move four times the bytes (``benchmarks/kv_cache_formats.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from fusion_edge.export.lowering.base import OnnxOperations, OnnxValue
from fusion_edge.kernels.onnx_functions.masked_attention import BLOCKED, masked_attention_function
from fusion_edge.runtime.bundle.graphs import TensorSpec

QUANTIZATION_STEP = 2.0**-7
"""Value of a code's last bit, as a part of the scale. A power of two: codes are exact in float16, and below 1."""
LARGEST_CODE = 127
SMALLEST_SCALE = 2.0**-14
"""Smallest normal float16: of rows of zeros."""


class QuantizedKvCacheOperations(OnnxOperations):
    """Operations with an int8 cache ``[tokens,kv_heads,head_dim]`` and its scales ``[tokens,kv_heads]``, by layer.

    A key or value is ``code * QUANTIZATION_STEP * scale``; its code is the int8 that the cache holds.
    """

    def quantized_cache_attention(self, q: OnnxValue, k: OnnxValue, v: OnnxValue, layer: int) -> OnnxValue:
        """Return attention ``[1,heads,L,dim]`` of ``q [1,heads,L,dim]`` to the cache and to new rows ``k``, ``v``.

        The rows ``[1,kv_heads,L,dim]`` become outputs of the graph, quantized.
        """
        name = f"llm.layers.{layer}.attention"
        new = [self._quantized_rows(x, f"{layer}.{part}") for x, part in ((k, "key"), (v, "value"))]
        # Made for every layer: engines are cut between layers. A decode step has one query, which reads slots.
        one = self.builder.constant([1])
        in_slots = self._node("Min", [self._node("Shape", ["slots"]), one])
        length = self._node("Shape", [q], start=2, end=3)
        in_prompt = self._node("Sub", [length, in_slots])
        counts = self.concat([in_slots, in_prompt], axis=0)
        step, prompt = (self.input(x) for x in self.builder.node("Split", [q.name, counts.name], outputs=2, axis=2))
        results = [self._of_slots(step, new, layer, name), self._of_prefix(prompt, new, counts, layer, name)]
        return self.concat(results, axis=2)

    def _quantized_rows(self, x: OnnxValue, name: str) -> tuple[OnnxValue, OnnxValue]:
        """Quantize ``[1,heads,L,dim]``. Return codes ``[L,heads,dim]`` and scales ``[L,heads]``, outputs of the graph.

        The scale in float16 is rounded once, and codes are quotients in float32, so every runtime gets the same.
        """
        rows = self._node("Transpose", [self._rows(x)], f"new.{name}", perm=[1, 0, 2])
        axis = self.builder.constant([2])
        largest = self._wide(self._node("ReduceMax", [self._node("Abs", [rows]), axis]))
        factor = self.builder.constant(1 / (LARGEST_CODE * QUANTIZATION_STEP), "float32")
        least = self.builder.constant(SMALLEST_SCALE, "float32")
        exact = self._node("Max", [self._node("Mul", [largest, factor]), least])
        scale = self._node("Cast", [exact], to=TensorProto.FLOAT16)
        parts = self._node("Div", [self._wide(rows), self._wide(scale)])
        quantization = self.builder.constant(QUANTIZATION_STEP, "float32"), self.builder.constant(0, "int8")
        codes = self.builder.node("QuantizeLinear", [parts.name, *quantization], outputs=[f"new.{name}"])
        scales = self.builder.node("Squeeze", [scale.name, axis], outputs=[f"new.{name}_scale"])
        return self.input(codes[0]), self.input(scales[0])

    def _of_slots(self, q: OnnxValue, new: Sequence[tuple[OnnxValue, OnnxValue]], layer: int, name: str) -> OnnxValue:
        """Return attention of a decode step ``[1,heads,S,dim]`` to ``slots`` and to its own row; S is 1, else 0."""
        language = self.config.language
        groups = language.heads // language.kv_heads
        scaled = self._reshape(self.scale(q, language.head_dim**-0.5), language.kv_heads, groups, 0, 0)
        queries = self._node("Unsqueeze", [scaled, self.builder.constant([3])])  # [kv_heads,groups,S,1,dim]
        used, own = [self._past("slots", layer, part) for part in ("key", "value")], new
        first = self._node("Gather", ["positions", self.builder.constant([0])], axis=1)
        is_used = self._node("Less", ["slots", self._rows(first)])
        never = self.builder.constant(BLOCKED, "float16")
        scores = [
            self._node("Where", [is_used, self._scores(queries, used[0]), never]),
            self._scores(queries, own[0]),
        ]
        shares = self._node("Softmax", [self.concat(scores, axis=3)], name, axis=-1)
        counts = [self._node("Shape", ["slots"]), self._node("Shape", ["positions"], start=1, end=2)]
        parts = self.builder.node("Split", [shares.name, self.concat(counts, axis=0).name], outputs=2, axis=-1)
        weighted = [self._weighted(self.input(part), rows) for part, rows in zip(parts, (used[1], own[1]), strict=True)]
        total = self._node("Cast", [weighted[0] + weighted[1]], to=TensorProto.FLOAT16)
        return self._reshape(total, 1, language.heads, 0, 0)

    def _scores(self, queries: OnnxValue, keys: tuple[OnnxValue, OnnxValue]) -> OnnxValue:
        """Multiply ``[kv_heads,groups,S,1,dim]`` with keys -> ``[kv_heads,groups,S,tokens]``.

        In float16: TensorRT-RTX would write sums in float32. Only products near 0 are subnormal here.
        """
        values, scales = self._broadcast(keys, "float16")
        total = self._node("ReduceSum", [queries * values, self.builder.constant([4])], keepdims=0)
        return total * scales

    def _weighted(self, shares: OnnxValue, rows: tuple[OnnxValue, OnnxValue]) -> OnnxValue:
        """Add values ``[kv_heads,groups,S,tokens]`` -> ``[kv_heads,groups,S,dim]`` float32.

        One of thousands of equal shares of a small value is subnormal in float16.
        """
        values, scales = self._broadcast(rows, "float32")
        weights = self._node("Unsqueeze", [self._wide(shares) * self._wide(scales), self.builder.constant([4])])
        return self._node("ReduceSum", [weights * values, self.builder.constant([3])], keepdims=0)

    def _broadcast(self, rows: tuple[OnnxValue, OnnxValue], dtype: str) -> tuple[OnnxValue, OnnxValue]:
        """Return codes as parts of the scale ``[kv_heads,1,1,tokens,dim]``, and scales ``[kv_heads,1,1,tokens]``."""
        axes = self.builder.constant([1, 2])
        scales = self._node("Transpose", [rows[1]], perm=[1, 0])
        codes = self._by_head(rows[0], dtype)
        return self._node("Unsqueeze", [codes, axes]), self._node("Unsqueeze", [scales, axes])

    def _wide(self, x: OnnxValue) -> OnnxValue:
        return self._node("Cast", [x], to=TensorProto.FLOAT)

    def _by_head(self, codes: OnnxValue, dtype: str) -> OnnxValue:
        """Return codes ``[tokens,kv_heads,dim]`` as parts of the scale, ``[kv_heads,tokens,dim]``."""
        parts = self._node("DequantizeLinear", [codes, self.builder.constant(QUANTIZATION_STEP, dtype)])
        return self._node("Transpose", [parts], perm=[1, 0, 2])

    def _past(self, way: str, layer: int, part: str) -> tuple[OnnxValue, OnnxValue]:
        """Return cached codes and scales: inputs of the graph."""
        return self.input(f"{way}.{layer}.{part}"), self.input(f"{way}.{layer}.{part}_scale")

    def _of_prefix(
        self, q: OnnxValue, new: Sequence[tuple[OnnxValue, OnnxValue]], counts: OnnxValue, layer: int, name: str
    ) -> OnnxValue:
        """Return causal attention of a prompt ``[1,heads,P,dim]`` to ``prefix`` and to itself."""
        keys, values = (
            self._dequantized_rows(self._past("prefix", layer, part), rows)
            for part, rows in zip(("key", "value"), new, strict=True)
        )
        positions = self._rows(self.input("positions"))
        tokens = self.concat([self.input("prefix"), positions], axis=0)
        _, rows = self.builder.node("Split", [positions.name, counts.name], outputs=2, axis=0)
        rows_by_axis = self._node("Unsqueeze", [rows, self.builder.constant([0, 1, 3])])
        mask = self._node("LessOrEqual", [tokens, rows_by_axis], f"{name}.mask")  # [1,1,P,prefix+L]
        language = self.config.language
        function = masked_attention_function(language.heads // language.kv_heads, self.opset)
        return self._function(function, [q, keys, values, mask], name, scale=language.head_dim**-0.5)

    def _dequantized_rows(self, *parts: tuple[OnnxValue, OnnxValue]) -> OnnxValue:
        """Return codes and scales of all ``parts``, joined, as ``[1,kv_heads,tokens,dim]`` float16."""
        codes, by_token = (self.concat(same, axis=0) for same in zip(*parts, strict=True))
        scales = self._node("Transpose", [by_token], perm=[1, 0])
        by_head = self._by_head(codes, "float16") * self._node("Unsqueeze", [scales, self.builder.constant([2])])
        return self._node("Unsqueeze", [by_head, self.builder.constant([0])])

    def describe_attention(self, attended: OnnxValue) -> None:
        """Describe ``[1,L,width]``: TensorRT and ONNX do not add the rows of both parts."""
        width = self.config.language.heads * self.config.language.head_dim
        self.builder.described.append(TensorSpec(attended.name, self.settings.activations, (1, "positions", width)))
