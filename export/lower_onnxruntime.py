"""The ONNX Runtime interpreter: FUSION written down as graphs of ONNX opset 21 and Microsoft's contributed operators.

Quickest there: MatMulNBits for quantized linears (MatMulBnb4 for those with a codebook), GroupQueryAttention for the
LLM, MultiHeadAttention for the vision tower. Values are the names of ONNX values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from fusion_edge.export import int8_cache
from fusion_edge.export.graph_builder import MICROSOFT, ONNX_TYPES, OPSET, GraphBuilder, subgraph
from fusion_edge.export.packed.layout import Form
from fusion_edge.export.tensor_names import Parameter
from fusion_edge.kernels import onnx_functions
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.config import FusionConfig

BNB4_TYPES = ("fp4", "nf4")  # MatMulBnb4's attribute quant_type is the index
BLOCKED = -1e9  # added to the score of a masked key: its weight becomes exactly 0


@dataclass(frozen=True)
class Settings:
    """What the lowering must know beside the model."""

    activations: str
    """numpy dtype name of everything that flows: float32 on CPUs, float16 on CUDA."""
    accuracy_level: int
    """MatMulNBits' attribute: 0 computes in the activations' type, 4 rounds activations to int8 blocks."""
    cache: str
    """numpy dtype name of the KV cache: the activations', or int8."""
    max_context: int


@dataclass(frozen=True)
class OnnxValue:
    """The name of a value, with the two operators that the architecture writes as ``+`` and ``*``."""

    name: str
    builder: GraphBuilder

    def __add__(self, other: OnnxValue) -> OnnxValue:
        return OnnxValue(self.builder.node("Add", [self.name, other.name])[0], self.builder)

    def __mul__(self, other: OnnxValue) -> OnnxValue:
        return OnnxValue(self.builder.node("Mul", [self.name, other.name])[0], self.builder)


class OnnxRuntimeOperations:
    """Operations (``export/operations.py``) that append nodes to a :class:`GraphBuilder`. B = 1 throughout."""

    def __init__(
        self,
        config: FusionConfig,
        builder: GraphBuilder,
        parameters: Mapping[str, Parameter],
        formats: Mapping[str, WeightFormat],
        packed: Mapping[str, Form],
        settings: Settings,
    ) -> None:
        self.config = config
        self.builder = builder
        self.parameters = parameters
        self.formats = formats
        self.packed = packed
        self.settings = settings
        self._has_any: dict[str, OnnxValue] = {}

    def input(self, name: str) -> OnnxValue:
        """A graph input as a value."""
        return OnnxValue(name, self.builder)

    def output(self, value: OnnxValue, name: str) -> None:
        """Make ``value`` the graph output ``name``, in the type that the graph's specification gives it."""
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
        form = WeightFormat("fp16" if dtype == "float16" else "fp32")
        return self.input(self.builder.plan(name, "values", form, dtype, self.parameters[name].shape))

    def linear(self, x: OnnxValue, name: str, bias: bool = False) -> OnnxValue:
        form, weight = self.formats[name], self.parameters[f"{name}.weight"]
        offset = self.parameter(f"{name}.bias") if bias else None
        if form.rounds_inputs:
            return self._integer_product(x, name, form, weight, offset)
        if form.is_quantized:
            return self._quantized(x, name, form, weight, offset)
        dtype = np.float16 if form.kind == "fp16" else np.float32
        values = self.builder.plan(weight.name, "values", form, np.dtype(dtype).name, weight.shape)
        product = self._node(
            "FusedMatMul", [x, self._cast(values, np.dtype(dtype).name)], name, MICROSOFT, transB=1
        )
        return product if offset is None else product + offset

    def _quantized(
        self, x: OnnxValue, name: str, form: WeightFormat, weight: Parameter, bias: OnnxValue | None
    ) -> OnnxValue:
        rows, columns = weight.shape
        shape = form.packed_shape(rows, columns)
        stored = self.packed.get(name)
        if stored is not None and stored.columns is not None:
            x = self._in_order(x, weight, form, stored.columns)
        scale_dtype = form.scale_dtype if stored is None else stored.scale_dtype
        values = self.builder.plan(weight.name, "values", form, "uint8", shape)
        scales = self.builder.plan(weight.name, "scales", form, scale_dtype, shape[:2])
        inputs: list[OnnxValue | str] = [x, values, self._cast(scales, scale_dtype)]
        if form.has_codebook:
            sizes = {"K": columns, "N": rows, "block_size": form.group_size}
            quant_type = BNB4_TYPES.index(form.kind)
            product = self._node("MatMulBnb4", inputs, name, MICROSOFT, **sizes, quant_type=quant_type)
            return product if bias is None else product + bias
        if not form.is_symmetric:
            groups = (rows, -(-shape[1] * form.bits // 8))
            inputs.append(self.builder.plan(weight.name, "zero_points", form, "uint8", groups))
        elif bias is not None:
            inputs.append("")
        if bias is not None:
            inputs += ["", bias]  # no group indices
        return self._node(
            "MatMulNBits",
            inputs,
            name,
            MICROSOFT,
            K=columns,
            N=rows,
            bits=form.bits,
            block_size=form.block_size,
            accuracy_level=self.settings.accuracy_level,
        )

    def _in_order(self, x: OnnxValue, weight: Parameter, form: WeightFormat, columns: tuple[int, ...]) -> OnnxValue:
        """Inputs in the order in which a quantized checkpoint groups the columns of their weight."""
        order = np.array(columns, np.int32)
        name = self.builder.plan(weight.name, "columns", form, "int32", order.shape, order)
        return self._node("Gather", [x, name], name, axis=-1)

    def _integer_product(
        self, x: OnnxValue, name: str, form: WeightFormat, weight: Parameter, bias: OnnxValue | None
    ) -> OnnxValue:
        """Inputs and weights rounded to 8 bits; ONNX Runtime fuses the pattern to one product of integers."""
        rows, columns = weight.shape
        plan = self.builder.plan
        values = plan(weight.name, "values", form, "int8", (rows, columns))
        scales = self._cast(plan(weight.name, "scales", form, "float16", (rows,)), "float16")
        scale = plan(weight.name, "input_scale", form, "float32", ())
        zero_point = plan(weight.name, "input_zero_point", form, "uint8", ())
        rounded = self._node("QuantizeLinear", [x, scale, zero_point], f"{name}.input")
        inputs = self._node("DequantizeLinear", [rounded, scale, zero_point], f"{name}.input")
        by_column = self._node("Transpose", [values], f"{weight.name}.by_column", perm=[1, 0])  # folded at load
        weights = self._node("DequantizeLinear", [by_column, scales], weight.name, axis=1)
        product = self._node("MatMul", [inputs, weights], name)
        return product if bias is None else product + bias

    def _cast(self, stored: str, dtype: str) -> str:
        """Stored values in the activations' type; ONNX Runtime folds the cast of a constant when it loads."""
        if dtype == self.settings.activations:
            return stored
        to = ONNX_TYPES[self.settings.activations]
        return self.builder.node("Cast", [stored], stored, to=to)[0]

    # Norms and activation functions -------------------------------------------------------------------------

    def layer_norm(self, x: OnnxValue, name: str, eps: float) -> OnnxValue:
        weights = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self._node("LayerNormalization", [x, *weights], name, axis=-1, epsilon=eps)

    def rms_norm(self, x: OnnxValue, name: str, eps: float) -> OnnxValue:
        weight = self.parameter(f"{name}.weight")
        added = next((node for node in reversed(self.builder.nodes) if x.name in node.output), None)
        if added is not None and added.op_type == "Add":
            return self._skip_rms_norm(added, weight, name, eps)
        inputs = [x, weight]
        return self._node("SimplifiedLayerNormalization", inputs, name, axis=-1, epsilon=eps, stash_type=1)

    def _skip_rms_norm(self, added: NodeProto, weight: OnnxValue, name: str, eps: float) -> OnnxValue:
        """The residual sum and its norm as one node, in the place of the sum: one pass over the rows less."""
        added.op_type, added.domain = "SkipSimplifiedLayerNormalization", MICROSOFT
        added.input.append(weight.name)
        added.output[:] = [name, "", "", added.output[0]]
        added.attribute.append(helper.make_attribute("epsilon", eps))
        return self.input(name)

    def gelu(self, x: OnnxValue) -> OnnxValue:
        return self._node("Gelu", [x])

    def gelu_tanh(self, x: OnnxValue) -> OnnxValue:
        return self._node("Gelu", [x], approximate="tanh")

    def silu(self, x: OnnxValue) -> OnnxValue:
        return self._node("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)

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

    def if_any(self, positions: OnnxValue, then: Callable[[], OnnxValue], otherwise: OnnxValue) -> OnnxValue:
        if positions.name not in self._has_any:
            zero = self.builder.constant(0)
            self._has_any[positions.name] = self._node("Greater", [self._node("Size", [positions]), zero])
        with self.builder.branch() as body:
            computed = then()
        with self.builder.branch() as rest:
            kept = self._node("Identity", [otherwise])
        branches = {
            "then_branch": subgraph("any", body, [computed.name]),
            "else_branch": subgraph("none", rest, [kept.name]),
        }
        return self._node("If", [self._has_any[positions.name]], **branches)

    def _rows(self, x: OnnxValue) -> OnnxValue:
        """``[1,L,D]`` -> ``[L,D]``."""
        return self._node("Squeeze", [x, self.builder.constant([0])])

    def take_rows(self, x: OnnxValue, positions: OnnxValue) -> OnnxValue:
        return self._node("Gather", [self._rows(x), positions], axis=0)

    def put_rows(self, x: OnnxValue, positions: OnnxValue, rows: OnnxValue) -> OnnxValue:
        indices = self._node("Unsqueeze", [positions, self.builder.constant([-1])])
        replaced = self._node("ScatterND", [self._rows(x), indices, rows])
        return self._node("Unsqueeze", [replaced, self.builder.constant([0])])

    def expand_questions(self, questions: OnnxValue) -> OnnxValue:
        return self._node("Unsqueeze", [questions, self.builder.constant([1])])

    def layer(self, stacked: OnnxValue, index: int, layers: int) -> OnnxValue:
        return self._slice(stacked, index, index + 1, 0)

    # Attention ----------------------------------------------------------------------------------------------

    def key_mask(self, patches: OnnxValue, text_mask: OnnxValue) -> OnnxValue:
        pads = self.builder.constant([0, self.config.vision.patches, 0, 0])
        return self._node("Pad", [text_mask, pads, self.builder.constant(1, "int32")])

    def attention(
        self, q: OnnxValue, k: OnnxValue, v: OnnxValue, heads: int, key_mask: OnnxValue
    ) -> OnnxValue:
        inputs: list[OnnxValue | str] = [q, k, v, "", key_mask]
        return self._node(
            "MultiHeadAttention", inputs, domain=MICROSOFT, num_heads=heads, mask_filter_value=BLOCKED
        )

    def causal_attention(self, qkv: OnnxValue, layer: int) -> OnnxValue:
        language = self.config.language
        cos, sin = (self._rotary_table(name, table) for name, table in (("cos", np.cos), ("sin", np.sin)))
        attributes = {
            "num_heads": language.heads,
            "kv_num_heads": language.kv_heads,
            "do_rotary": 1,
            "scale": language.head_dim**-0.5,
        }
        name = f"llm.layers.{layer}.attention"
        if self.settings.cache == "int8":
            self.builder.nodes.append(
                int8_cache.attention_node(
                    layer, qkv.name, [cos, sin], language.kv_heads, language.head_dim, attributes
                )
            )
            return self.input(name)
        parts = ("key", "value")
        past, present = ([f"{time}.{layer}.{part}" for part in parts] for time in ("past", "present"))
        inputs = [qkv.name, "", "", *past, "last_position", "total_length", cos, sin]
        outputs = [name, *present]
        self.builder.node("GroupQueryAttention", inputs, name, MICROSOFT, outputs, **attributes)
        return self.input(name)

    def _rotary_table(self, name: str, function: np.ufunc) -> str:
        """cos or sin of every position's angles, ``[max_context, head_dim/2]``."""
        language = self.config.language
        frequencies = np.array(language.rotary_inverse_frequencies)
        angles: npt.NDArray[np.float64] = np.outer(np.arange(self.settings.max_context), frequencies)
        values = function(angles) * language.rotary_scale
        return self.builder.table(f"llm.rotary.{name}", values, self.settings.activations)

    def context_attention(self, q: OnnxValue, k: OnnxValue, v: OnnxValue, heads: int) -> OnnxValue:
        dim = self.config.language.hidden_size // heads
        self.builder.functions[onnx_functions.CONTEXT_ATTENTION] = onnx_functions.context_attention_function(
            heads, dim, self.settings.activations, OPSET
        )
        return self._node(onnx_functions.CONTEXT_ATTENTION, [q, k, v], domain=onnx_functions.DOMAIN)
