"""Write the data files of a bundle: weights stream through in blocks of rows, on every processor."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.bundle.durable_files import reserve, write_all
from fusion_edge.export.bundle.weight_source import WeightSource
from fusion_edge.export.bundle.worker_pool import worker_pool
from fusion_edge.export.lowering.graph_builder import Part, PlannedTensor
from fusion_edge.export.planning.plan import DataFile, ExportPlan
from fusion_edge.quant import float8
from fusion_edge.quant.dequantize_linear import to_dequantize_linear
from fusion_edge.quant.formats import ActivationQuantization
from fusion_edge.quant.packing import Packed, check_range
from fusion_edge.runtime.bundle.quantization_report import PREQUANTIZED, LinearReport, QuantizationReport, sqnr
from fusion_edge.runtime.system.progress import Progress
from fusion_edge.runtime.system.resources import usable_processors

BLOCK_ELEMENTS = 1 << 19  # float32 values per block of rows: 2 MB, which fits a core's cache


@dataclass
class _Totals:
    """Sums over the blocks of a weight."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    seconds: float = 0.0


class DataWriter:
    """Writes the weights of a source. The offset of every block is known, so blocks are written in any order."""

    def __init__(self, plan: ExportPlan, source: WeightSource, progress: Progress) -> None:
        self._parameters = plan.parameters
        self._linears = plan.linear_by_weight
        self._source = source
        self._tensor_scale = lru_cache(maxsize=None)(source.tensor_scale)
        self._progress = progress
        self._columns = _Columns()
        self._reports = {linear.name: linear for linear in source.report.linears}

    def write(self, path: Path, file: DataFile) -> None:
        """Write a data file.

        Raises :class:`FusionError` for a weight that is not finite or exceeds the range of its format, and
        :class:`OSError`.
        """
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            if file.size:
                reserve(descriptor, file.size)
            for tensor in file.tensors:
                if tensor.content is not None:
                    _write_at(descriptor, tensor.content, tensor.offset)
                elif tensor.shape == ():
                    _write_at(descriptor, self._scalar(tensor), tensor.offset)
            groups = _by_parameter(file, self._parameters)
            blocks = [(name, start, stop) for name in groups for start, stop in self._blocks(name)]
            totals = {name: _Totals() for name in groups}
            with worker_pool(usable_processors(), self._progress) as pool:
                parts = pool.map(lambda block: self._write_block(descriptor, groups[block[0]], *block), blocks)
                for (name, _, _), part in zip(blocks, parts, strict=True):
                    total = totals[name]
                    total.squared_error += part.squared_error
                    total.squared_norm += part.squared_norm
                    total.seconds += part.seconds
        finally:
            os.close(descriptor)
        for name, total in totals.items():
            self._report(name, total)

    def report(self) -> QuantizationReport:
        """Return the report of everything written so far."""
        return replace(self._source.report, linears=tuple(self._reports.values()))

    def _scalar(self, tensor: PlannedTensor) -> npt.NDArray[Any]:
        """Return the scale of a whole weight, or the scale or the zero point of a linear's activations."""
        linear = self._linears[tensor.parameter]
        if tensor.part == "tensor_scale":
            return np.array(self._tensor_scale(linear), tensor.dtype)
        activations = self._source.activation_quantization(linear)
        if tensor.part == "input_scale":
            return np.array(activations.scale, tensor.dtype)
        assert isinstance(activations, ActivationQuantization)  # others have no zero points
        return np.array(activations.zero_point, tensor.dtype)

    def _report(self, name: str, total: _Totals) -> None:
        linear = self._linears.get(name)
        if linear is None or not linear.format.is_quantized or linear.name in self._reports:
            return
        method = PREQUANTIZED if linear.prequantized else "rtn"
        quality = None if linear.prequantized else sqnr(total.squared_error, total.squared_norm)
        fmt = str(linear.format)
        self._reports[linear.name] = LinearReport(linear.name, fmt, method, quality, None, None, total.seconds)

    def _blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield ranges of a parameter's rows."""
        parameter = self._parameters[name]
        rows = parameter.shape[0]
        step = max(2, BLOCK_ELEMENTS * rows // parameter.size & ~1)  # even: two columns of INT4 share a byte
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def _write_block(self, descriptor: int, tensors: list[PlannedTensor], name: str, start: int, stop: int) -> _Totals:
        """Write rows of a parameter: values, scales and zero points."""
        started = time.monotonic()
        contents, totals = self._contents(tensors[0], name, start, stop)
        totals.seconds = time.monotonic() - started
        for tensor in tensors:
            if tensor.by_column:
                self._columns.write(descriptor, tensor, start, stop, contents[tensor.part])
                continue
            row_bytes = tensor.nbytes // tensor.shape[0]
            _write_at(descriptor, contents[tensor.part], tensor.offset + start * row_bytes)
        parameter = self._parameters[name]
        self._progress.advance((stop - start) * parameter.size // parameter.shape[0])
        return totals

    def _contents(
        self, values: PlannedTensor, name: str, start: int, stop: int
    ) -> tuple[dict[Part, npt.NDArray[Any]], _Totals]:
        """Return the arrays by part, and the rounding error."""
        if values.format.is_quantized:
            rows = self._source.packed_rows(self._linears[name], start, stop)
            parts = _parts(rows.packed, values)
            if values.format.kind == "nvfp4":
                scales = parts["scales"] / np.float32(self._tensor_scale(self._linears[name]))
                parts["scales"] = float8.encode(scales.astype(np.float32, copy=False))
            return parts, _Totals(rows.squared_error, rows.squared_norm)
        floats = self._source.float_rows(name, start, stop)
        check_range(name, floats, values.format)
        return {"values": np.ascontiguousarray(floats, dtype=values.dtype)}, _Totals()


class _Columns:
    """Tensors that are filled by column: each is assembled in memory and written whole. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwritten: dict[str, tuple[npt.NDArray[Any], int]] = {}
        """By name: the content so far, and the number of missing columns."""

    def write(self, descriptor: int, tensor: PlannedTensor, start: int, stop: int, columns: npt.NDArray[Any]) -> None:
        """Add columns ``start`` to ``stop``. Writes the tensor after the last ones."""
        rows, count = tensor.shape
        packed = 2 if tensor.dtype == "int4" else 1
        with self._lock:
            whole, missing = self._unwritten.get(tensor.name, (None, count))
            if whole is None:
                whole = np.empty((rows, count // packed), columns.dtype)
            self._unwritten[tensor.name] = whole, missing - (stop - start)
            is_last = missing == stop - start
            whole[:, start // packed : stop // packed] = columns
            if is_last:
                del self._unwritten[tensor.name]
        if is_last:
            _write_at(descriptor, whole, tensor.offset)


def _parts(packed: Packed, values: PlannedTensor) -> dict[Part, npt.NDArray[Any]]:
    """Return packed rows in the layout of the tensor ``values``."""
    if values.is_for_dequantize_linear:
        inputs = values.shape[0 if values.by_column else 1]
        integers, scales = to_dequantize_linear(packed, values.format, inputs)
        return {"values": integers, "scales": scales}
    parts: dict[Part, npt.NDArray[Any]] = {"values": packed.values, "scales": packed.scales}
    if packed.zero_points is not None:
        parts["zero_points"] = packed.zero_points
    return parts


def _by_parameter(file: DataFile, known: Container[str]) -> dict[str, list[PlannedTensor]]:
    """Return the tensors of a data file that each parameter fills, values first."""
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in file.tensors:
        if tensor.parameter in known and tensor.shape != () and tensor.content is None:
            groups.setdefault(tensor.parameter, []).append(tensor)
    return groups


def _write_at(descriptor: int, content: npt.NDArray[Any], offset: int) -> None:
    """Write all bytes of an array."""
    write_all(descriptor, np.ascontiguousarray(content).data.cast("B"), offset)
