"""Base of the ONNX interpreters: operations with the same standard operators for every runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import FunctionProto

from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.lowering.graph_builder import ONNX_TYPES, GraphBuilder, Part
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.model.operations import Operations, decomposed_self_attention
from fusion_edge.kernels.onnx_functions import alignment
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.bundle.config import FusionConfig


@dataclass(frozen=True)
class Settings:
    """Settings of a lowering, beside the model."""

    target: str
    activations: str
    """numpy dtype name of the values that flow in the graphs: float32 on CPUs, float16 on GPUs."""
    accuracy_level: int
    """MatMulNBits' attribute: 0 computes in the activations' dtype, 4 quantizes activations to int8 blocks."""
    cache: str
    """numpy dtype name of the KV cache: that of the activations, or int8."""
    max_context: int


@dataclass(frozen=True)
class OnnxValue:
    """Name of a value. ``+`` and ``*`` append nodes."""

    name: str
    builder: GraphBuilder

    def __add__(self, other: OnnxValue) -> OnnxValue:
        return OnnxValue(self.builder.node("Add", [self.name, other.name])[0], self.builder)

    def __mul__(self, other: OnnxValue) -> OnnxValue:
        return OnnxValue(self.builder.node("Mul", [self.name, other.name])[0], self.builder)


class OnnxOperations(Operations[OnnxValue]):
    """Operations (``export/model/operations.py``) that append nodes to a :class:`GraphBuilder`. B = 1 throughout."""

    opset: int
    passes: tuple[Callable[[GraphBuilder], None], ...] = ()
    """Rewrites of a finished graph, in order."""
    stores_int4_by_column: bool = False
    """Whether 4-bit weights are ``[K,N]`` in the data file, instead of rows of packed blocks."""

    def __init__(
        self,
        config: FusionConfig,
        builder: GraphBuilder,
        parameters: Mapping[str, Parameter],
        linears: Mapping[str, Linear],
        settings: Settings,
    ) -> None:
        self.config = config
        self.builder = builder
        self.parameters = parameters
        self.linears = linears
        self.settings = settings

    def input(self, name: str) -> OnnxValue:
        """Return the value with a name, such as a graph input."""
        return OnnxValue(name, self.builder)

    def output(self, value: OnnxValue, name: str) -> None:
        """Make ``value`` the graph output ``name``, cast to the dtype of the graph's specification."""
        dtype = next(spec.dtype for spec in self.builder.spec.outputs if spec.name == name)
        if dtype == self.settings.activations:
            self.builder.node("Identity", [value.name], f"output.{name}", outputs=[name])
        else:
            self.builder.node("Cast", [value.name], f"output.{name}", outputs=[name], to=ONNX_TYPES[dtype])

    def _node(
        self, operator: str, inputs: Sequence[OnnxValue | str], scope: str = "", domain: str = "", **attributes: Any
    ) -> OnnxValue:
        names = [value if isinstance(value, str) else value.name for value in inputs]
        return self.input(self.builder.node(operator, names, scope, domain, **attributes)[0])

    def _reshape(self, x: OnnxValue, *shape: int) -> OnnxValue:
        return self._node("Reshape", [x, self.builder.constant(shape)])

    def _slice(self, x: OnnxValue, start: int, stop: int, axis: int) -> OnnxValue:
        bounds = [self.builder.constant([number]) for number in (start, stop, axis)]
        return self._node("Slice", [x, *bounds])

    # Weights ------------------------------------------------------------------------------------------------

    def parameter(self, name: str) -> OnnxValue:
        dtype = self.settings.activations
        fmt = WeightFormat("fp16" if dtype == "float16" else "fp32")
        return self.input(self.builder.plan(name, "values", fmt, dtype, self.parameters[name].shape))

    def _cast(self, stored: str, dtype: str) -> str:
        """Cast stored values to the activations' dtype. ONNX Runtime folds the cast of a constant at load."""
        if dtype == self.settings.activations:
            return stored
        to = ONNX_TYPES[self.settings.activations]
        return self.builder.node("Cast", [stored], stored, to=to)[0]

    def _plan(self, linear: Linear, part: Part, dtype: str, shape: tuple[int, ...], by_column: bool = False) -> str:
        """Give a part of a linear its place in the data file. Returns the initializer's name."""
        return self.builder.plan(linear.weight.name, part, linear.format, dtype, shape, by_column=by_column)

    def _in_stored_order(self, x: OnnxValue, linear: Linear) -> OnnxValue:
        """Gather inputs in the order of the stored columns, if a prequantized checkpoint reorders them."""
        if linear.column_order is None:
            return x
        order = np.array(linear.column_order, np.int32)
        name = self.builder.plan(linear.weight.name, "columns", linear.format, "int32", order.shape, order)
        return self._node("Gather", [x, name], name, axis=-1)

    # Norms and activation functions -------------------------------------------------------------------------

    def layer_norm(self, x: OnnxValue, name: str, eps: float) -> OnnxValue:
        weights = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self._node("LayerNormalization", [x, *weights], name, axis=-1, epsilon=eps)

    def add_layer_norm(self, x: OnnxValue, residual: OnnxValue, name: str, eps: float) -> OnnxValue:
        return self.layer_norm(x + residual, name, eps)

    def gelu(self, x: OnnxValue) -> OnnxValue:
        return self._node("Gelu", [x])

    def gelu_mlp(self, x: OnnxValue, name: str) -> OnnxValue:
        hidden = self.linear(x, f"{name}.up", bias=True)
        return self.linear(self._node("Gelu", [hidden], approximate="tanh"), f"{name}.down", bias=True)

    # Shapes -------------------------------------------------------------------------------------------------

    def scale(self, x: OnnxValue, factor: float) -> OnnxValue:
        return self._node("Mul", [x, self.builder.constant(factor, self.settings.activations)])

    def concat(self, parts: Sequence[OnnxValue], axis: int) -> OnnxValue:
        return self._node("Concat", list(parts), axis=axis)

    def split(self, x: OnnxValue, parts: int) -> Sequence[OnnxValue]:
        names = self.builder.node("Split", [x.name], outputs=parts, axis=-1, num_outputs=parts)
        return [self.input(name) for name in names]

    def unfold(self, pixels: OnnxValue, grid: int, patch: int) -> OnnxValue:
        used = self._slice(self._slice(pixels, 0, grid * patch, 2), 0, grid * patch, 3)
        blocks = self._reshape(used, -1, 3, grid, patch, grid, patch)
        rows = self._node("Transpose", [blocks], perm=[0, 2, 4, 1, 3, 5])
        return self._reshape(rows, -1, grid * grid, 3 * patch * patch)

    def head_rows(self, x: OnnxValue, rows: int) -> OnnxValue:
        return self._slice(x, 0, rows, 1)

    def last_row(self, x: OnnxValue) -> OnnxValue:
        return self._node("Gather", [x, self.builder.constant(-1)], axis=1)

    def mean_for_tail_rows(self, x: OnnxValue, rows: int) -> OnnxValue:
        tail = self._slice(x, rows, np.iinfo(np.int64).max, 1)
        mean = self._node("ReduceMean", [x, self.builder.constant([1])], keepdims=1)
        return self._node("Expand", [mean, self._node("Shape", [tail])])

    def global_map(self, features: OnnxValue, grid: int) -> OnnxValue:
        hidden = self.config.language.hidden_size
        crops = self._reshape(features, -1, 2, 2, grid, grid, hidden)
        in_place = self._node("Transpose", [crops], perm=[0, 1, 3, 2, 4, 5])
        return self._reshape(in_place, -1, 2 * grid, 2 * grid, hidden)

    def pool(self, image: OnnxValue, cells: OnnxValue) -> OnnxValue:
        for axis in (1, 2):
            gathered = self._node("Gather", [image, cells], axis=axis)
            image = self._node("ReduceMax", [gathered, self.builder.constant([axis + 1])], keepdims=0)
        return image

    def windows(self, image: OnnxValue, window: int) -> OnnxValue:
        hidden = self.config.language.hidden_size
        bands = self._reshape(image, -1, window, 0, hidden)  # [s,w,n,D]
        columns = self._reshape(self._node("Transpose", [bands], perm=[0, 2, 1, 3]), 0, -1, window, window, hidden)
        rows_first = self._node("Transpose", [columns], perm=[0, 1, 3, 2, 4])
        return self._reshape(rows_first, 1, -1, window * window, hidden)

    def squeeze_window(self, windows: OnnxValue) -> OnnxValue:
        return self._node("Squeeze", [windows, self.builder.constant([2])])

    def _rows(self, x: OnnxValue) -> OnnxValue:
        """Drop axis 0: ``[1,L,D]`` -> ``[L,D]``."""
        return self._node("Squeeze", [x, self.builder.constant([0])])

    def take_rows(self, x: OnnxValue, positions: OnnxValue) -> OnnxValue:
        return self._node("Gather", [self._rows(x), positions], axis=0)

    def put_rows(self, x: OnnxValue, positions: OnnxValue, rows: OnnxValue, update: OnnxValue) -> OnnxValue:
        indices = self._node("Unsqueeze", [positions, self.builder.constant([-1])])
        replaced = self._node("ScatterND", [self._rows(x), indices, rows + update])
        return self._node("Unsqueeze", [replaced, self.builder.constant([0])])

    def expand_questions(self, questions: OnnxValue) -> OnnxValue:
        return self._node("Unsqueeze", [questions, self.builder.constant([1])])

    def layer(self, stacked: OnnxValue, index: int, layers: int) -> OnnxValue:
        return self._slice(stacked, index, index + 1, 0)

    # Attention ----------------------------------------------------------------------------------------------

    def self_attention(self, qkv: OnnxValue, heads: int, key_mask: OnnxValue, patches: int | None) -> OnnxValue:
        return decomposed_self_attention(self, qkv, heads, key_mask, patches)

    def _rotary_table(self, name: str, function: np.ufunc) -> str:
        """Plan a table of cos or sin of the rotary angles, ``[max_context, head_dim/2]``. Returns its name."""
        language = self.config.language
        frequencies = np.array(language.rotary_inverse_frequencies)
        angles = np.outer(np.arange(self.settings.max_context, dtype=np.float64), frequencies)
        values = function(angles) * language.rotary_scale
        return self.builder.table(f"llm.rotary.{name}", values, self.settings.activations)

    def context_attention(self, q: OnnxValue, k: OnnxValue, v: OnnxValue, heads: int) -> OnnxValue:
        dim = self.config.language.hidden_size // heads
        function = alignment.context_attention_function(heads, dim, self.settings.activations, self.builder.opset)
        return self._function(function, [q, k, v])

    def _function(
        self, function: FunctionProto, inputs: Sequence[OnnxValue | str], scope: str = "", **attributes: Any
    ) -> OnnxValue:
        """Append a call of a model-local function, and add the function to the model."""
        self.builder.functions[function.name] = function
        return self._node(function.name, inputs, scope, function.domain, **attributes)
