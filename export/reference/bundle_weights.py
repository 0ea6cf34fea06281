"""Dequantize the weights of a bundle, as its graphs do.

With these weights, the eager interpreter and the bundle must agree. A difference is an error of a graph, not of
quantization.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import onnx

from fusion_edge.export.checkpoint.tensor_mapping import Parameter, parameters
from fusion_edge.export.lowering.graph_builder import Part, PlannedTensor
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.plan import embedding_file
from fusion_edge.export.planning.rules import EMBEDDING
from fusion_edge.export.planning.targets import TARGETS
from fusion_edge.quant import float8
from fusion_edge.quant.dequantize_linear import from_dequantize_linear
from fusion_edge.quant.formats import (
    STORED_GROUP_SIZES,
    SYMMETRIC_ZERO_POINT,
    ActivationQuantization,
    InputQuantization,
    Nvfp4Activations,
    WeightFormat,
)
from fusion_edge.quant.packing import Packed, dequantize
from fusion_edge.runtime.bundle.manifest import EMBEDDINGS, data_file, graph_file
from fusion_edge.runtime.bundle.reader import Bundle


class BundleWeights:
    """Weights of a bundle, in the interface :class:`~fusion_edge.export.checkpoint.weights.Weights`."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the structure of the graphs. Weights are read on demand."""
        self.parameters: Mapping[str, Parameter] = parameters(bundle.manifest.model)
        self._bundle = bundle
        self._tensors: dict[tuple[str, Part], tuple[str, PlannedTensor]] = {}
        for graph in bundle.manifest.graphs:
            self._read_graph(graph)
        table = embedding_file(Linear(self.parameters[f"{EMBEDDING}.weight"], self._format(EMBEDDING)))
        self._add(EMBEDDINGS, *table.tensors)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows of a parameter, float32 ``[stop-start, ...]``."""
        values = self._read(name, "values", start, stop)
        tensor = self._tensors[name, "values"][1]
        fmt = tensor.format
        if not fmt.is_quantized:
            return values.astype(np.float32)
        if tensor.is_for_dequantize_linear:
            scales = self._read(name, "scales", start, stop)
            if fmt.kind == "nvfp4":
                scales = float8.VALUES[scales] * self._read(name, "tensor_scale", 0, 1)[0]
            packed = from_dequantize_linear(values.view(np.uint8), scales, fmt)
            return self._in_column_order(name, dequantize(packed, fmt, self.parameters[name].shape[1]))
        inputs = self.parameters[name].shape[1]
        shape = fmt.packed_shape(stop - start, inputs)
        scales = self._read(name, "scales", start, stop).reshape(shape[:2])
        zero_points = None if fmt.is_symmetric else self._read(name, "zero_points", start, stop)
        packed = Packed(values.view(np.uint8).reshape(shape), scales, zero_points)
        return self._in_column_order(name, dequantize(packed, fmt, inputs))

    def _in_column_order(self, name: str, stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return rows with their columns in order; a bundle may store columns in another order."""
        if (name, "columns") not in self._tensors:
            return stored
        ordered = np.empty_like(stored)
        ordered[:, self._read(name, "columns", 0, stored.shape[1])] = stored
        return ordered

    def activation_quantization(self, linear: str) -> InputQuantization | None:
        """Return how a linear quantizes its activations, None if it does not."""
        name = f"{linear}.weight"
        if (name, "input_scale") not in self._tensors:
            return None
        scale = float(self._read(name, "input_scale", 0, 1)[0])
        if self._format(linear).kind == "nvfp4":
            return Nvfp4Activations(scale)
        if (name, "input_zero_point") not in self._tensors:
            return ActivationQuantization(scale, SYMMETRIC_ZERO_POINT)
        return ActivationQuantization(scale, int(self._read(name, "input_zero_point", 0, 1)[0]))

    def _format(self, name: str) -> WeightFormat:
        return WeightFormat.parse(self._bundle.manifest.weights[name], sizes=STORED_GROUP_SIZES)

    def _read_graph(self, graph: str) -> None:
        """Record the offset of every initializer in the graph's data file."""
        model = onnx.load(self._bundle.path(graph_file(graph)), load_external_data=False)
        lowering = TARGETS[self._bundle.manifest.target].lowering
        for initializer in model.graph.initializer:
            place = {entry.key: entry.value for entry in initializer.external_data}
            last = initializer.name.rpartition(".")[2]
            part = cast(Part, last) if last in get_args(Part) else "values"
            parameter = initializer.name.removesuffix(f".{part}")
            if not place or parameter not in self.parameters:
                continue
            dtype = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type).name
            array = self.parameters[parameter]
            fmt = WeightFormat("fp32") if array.kind == "float" else self._format(array.linear)
            shape, offset = tuple(initializer.dims), int(place["offset"])
            name = initializer.name
            by_column = lowering.stores_int4_by_column and fmt.kind == "int4" and len(shape) == 2
            tensor = PlannedTensor(name, parameter, part, fmt, dtype, shape, offset, by_column=by_column)
            self._add(data_file(graph), tensor)

    def _add(self, file: str, *tensors: PlannedTensor) -> None:
        for tensor in tensors:
            self._tensors[tensor.parameter, tensor.part] = file, tensor

    def _read(self, name: str, part: Part, start: int, stop: int) -> npt.NDArray[Any]:
        file, tensor = self._tensors[name, part]
        path = self._bundle.path(file)
        if tensor.by_column:
            whole = np.frombuffer(_bytes(path, tensor.offset, tensor.nbytes), tensor.storage)
            packed = 2 if tensor.dtype == "int4" else 1
            return whole.reshape(tensor.shape[0], -1)[:, start // packed : stop // packed]
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape else tensor.nbytes
        content = _bytes(path, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        shape = (-1,) if tensor.dtype == "uint4" else tensor.shape[1:]
        return np.frombuffer(content, tensor.storage).reshape(stop - start, *shape)


def _bytes(path: Path, offset: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, count, offset)
    finally:
        os.close(descriptor)
