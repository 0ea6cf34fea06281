"""Builder of ONNX graphs whose weights are planned: each has a place in the data file, none is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fusion_edge.kernels.operators import DOMAIN, MICROSOFT
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.bundle.graph_validation import PAGE
from fusion_edge.runtime.bundle.graphs import GraphSpec, TensorSpec

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "uint8": TensorProto.UINT8,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "bool": TensorProto.BOOL,
}

Part = Literal["values", "scales", "zero_points", "columns", "tensor_scale", "input_scale", "input_zero_point"]
"""Part of a parameter. ``columns`` is the order of stored columns, if a prequantized checkpoint reorders them. The last
three are scalars: of a whole NVFP4 weight, and of a linear with quantized activations."""


@dataclass(frozen=True)
class PlannedTensor:
    """An initializer in the data file: a part of a parameter in some format."""

    name: str
    parameter: str
    part: Part
    format: WeightFormat
    dtype: str
    shape: tuple[int, ...]
    offset: int
    content: npt.NDArray[Any] | None = None
    """Values that are known when the graph is built: rotary tables, column orders."""
    by_column: bool = False
    """Whether rows of the parameter are stored as columns."""

    @property
    def storage(self) -> str:
        """numpy dtype name of the bytes in the data file; uint8 for types that numpy lacks."""
        return "uint8" if self.dtype in ("int4", "uint4", "float8_e4m3fn") else self.dtype

    @property
    def nbytes(self) -> int:
        """Size in the data file."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return -(-count // 2) if self.dtype in ("int4", "uint4") else count * np.dtype(self.storage).itemsize

    @property
    def is_for_dequantize_linear(self) -> bool:
        """Whether the layout is that of ``quant/dequantize_linear.py``."""
        if self.part != "values":
            return False
        return self.dtype in ("int4", "uint4", "float8_e4m3fn") or (self.dtype == "int8" and self.format.kind != "w8a8")


class GraphBuilder:
    """A graph under construction. Values are names; nodes are appended in topological order."""

    def __init__(self, spec: GraphSpec, opset: int) -> None:
        self.spec = spec
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.planned: dict[str, PlannedTensor] = {}
        self.functions: dict[str, FunctionProto] = {}
        self.described: list[TensorSpec] = []
        """Values whose shape cannot be inferred from the inputs of their node."""
        self.data_bytes = 0
        self._used: dict[str, int] = {}

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        scope: str = "",
        domain: str = "",
        outputs: int | Sequence[str] = 1,
        **attributes: Any,
    ) -> list[str]:
        """Append a node named after ``scope``, a path in the model. Returns the names of its outputs."""
        name = self._unique(f"{scope}.{operator}" if scope else operator)
        if isinstance(outputs, int):
            outputs = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=name, domain=domain, **attributes))
        return list(outputs)

    @contextmanager
    def branch(self) -> Iterator[list[NodeProto]]:
        """Collect the nodes appended inside in the yielded list, the body of a subgraph."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def constant(self, values: npt.ArrayLike, dtype: str = "int64") -> str:
        """Store a small array in the graph itself; equal short ones once. Returns its name."""
        array = np.asarray(values, dtype=dtype)
        name = f"constant.{dtype}.{'x'.join(map(str, array.shape))}.{array.tobytes().hex()}"
        if len(name) > 120:
            name = self._unique(f"constant.{dtype}.{'x'.join(map(str, array.shape))}")
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def plan(
        self,
        parameter: str,
        part: Part,
        fmt: WeightFormat,
        dtype: str,
        shape: tuple[int, ...],
        content: npt.NDArray[Any] | None = None,
        by_column: bool = False,
    ) -> str:
        """Give a part of a parameter its place in the data file. Returns the initializer's name."""
        name = parameter if part == "values" else f"{parameter}.{part}"
        self._place(PlannedTensor(name, parameter, part, fmt, dtype, shape, self.data_bytes, content, by_column))
        return name

    def table(self, name: str, values: npt.NDArray[Any], dtype: str) -> str:
        """Give a computed array its place in the data file. Returns the initializer's name."""
        content = values.astype(dtype)
        fmt = WeightFormat("fp32" if dtype == "float32" else "fp16")
        self._place(PlannedTensor(name, name, "values", fmt, dtype, content.shape, self.data_bytes, content))
        return name

    def _place(self, tensor: PlannedTensor) -> None:
        if tensor.name not in self.planned:
            self.planned[tensor.name] = tensor
            self.data_bytes += -(-tensor.nbytes // PAGE) * PAGE

    def is_topological(self) -> bool:
        """Return whether every node follows the nodes it reads. Branches are not checked."""
        known = {"", *self.constants, *self.planned, *(tensor.name for tensor in self.spec.inputs)}
        for node in self.nodes:
            if not known.issuperset(node.input):
                return False
            known.update(node.output)
        return True

    def model(self, data_file: str, producer_version: str) -> ModelProto:
        """Return the finished model. Planned tensors refer to ``data_file``."""
        graph = GraphProto(name=self.spec.name)
        graph.node.extend(self.nodes)
        graph.input.extend(_value_infos(self.spec.inputs))
        graph.output.extend(_value_infos(self.spec.outputs))
        graph.value_info.extend(_value_infos(self.described))
        graph.initializer.extend(self.constants.values())
        graph.initializer.extend(_external(tensor, data_file) for tensor in self.planned.values())
        imports = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            imports.append(helper.make_opsetid(MICROSOFT, 1))
        if self.functions:
            imports.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_model(
            graph,
            opset_imports=imports,
            functions=list(self.functions.values()),
            producer_name="fusion-edge",
            producer_version=producer_version,
            ir_version=helper.find_min_ir_version_for(imports, ignore_unknown=True),
        )

    def _unique(self, name: str) -> str:
        count = self._used.get(name, 0)
        self._used[name] = count + 1
        return f"{name}.{count}" if count else name


def _value_infos(specs: Iterable[TensorSpec]) -> list[Any]:
    return [helper.make_tensor_value_info(s.name, ONNX_TYPES[s.dtype], list(s.shape)) for s in specs]


def _external(tensor: PlannedTensor, data_file: str) -> TensorProto:
    proto = TensorProto(name=tensor.name, data_type=ONNX_TYPES[tensor.dtype], dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data_file), ("offset", tensor.offset), ("length", tensor.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    return proto
