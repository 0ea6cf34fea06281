"""Filling the data files of a bundle: weights stream through in blocks of rows, on every processor."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.bundle.durable_files import reserve, write_all
from fusion_edge.export.bundle.worker_pool import worker_pool
from fusion_edge.export.checkpoint.weights import CheckpointWeights
from fusion_edge.export.lowering.graph_builder import Part, PlannedTensor
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.plan import DataFile
from fusion_edge.quant.dequantize_linear import to_dequantize_linear
from fusion_edge.quant.packing import Packed, check_range, dequantize, quantize
from fusion_edge.runtime.bundle.quantization_report import PREQUANTIZED, LinearReport, QuantizationReport, sqnr
from fusion_edge.runtime.system.progress import Progress
from fusion_edge.runtime.system.resources import usable_processors

if TYPE_CHECKING:
    from fusion_edge.export.calibration.run import Calibrated  # needs torch, and so do calibrated weights

BLOCK_ELEMENTS = 1 << 19  # float32 values of one block of rows: 2 MB, small enough for a core's cache


@dataclass
class _Rounded:
    """Sums over the blocks of a weight: squares of what rounding changed, squares of the weights, seconds."""

    noise: float = 0.0
    signal: float = 0.0
    seconds: float = 0.0


class DataWriter:
    """Writes weights as they were calibrated or come quantized, or rounded to nearest.

    Each block's place is known: order is free.
    """

    def __init__(
        self,
        weights: CheckpointWeights,
        linears: Mapping[str, Linear],
        calibrated: Calibrated | None,
        progress: Progress,
    ) -> None:
        """``linears`` by the names of their weights."""
        self._weights = weights
        self._linears = linears
        self._calibrated = calibrated
        self._progress = progress
        self._columns = _Columns()
        self._reports: list[LinearReport] = list(calibrated.report.linears) if calibrated else []

    def write(self, path: Path, file: DataFile) -> None:
        """Write a data file. Raises :class:`FusionError` for a weight that is not finite or out of range of its
        format, :class:`OSError`.
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
            groups = _by_parameter(file, self._weights.parameters)
            blocks = [(name, start, stop) for name in groups for start, stop in self._blocks(name)]
            rounded = {name: _Rounded() for name in groups}
            with worker_pool(usable_processors(), self._progress) as pool:
                parts = pool.map(lambda block: self._write_block(descriptor, groups[block[0]], *block), blocks)
                for (name, _, _), part in zip(blocks, parts, strict=True):
                    total = rounded[name]
                    total.noise += part.noise
                    total.signal += part.signal
                    total.seconds += part.seconds
        finally:
            os.close(descriptor)
        for name, total in rounded.items():
            self._note(name, groups[name][0], total)

    def report(self) -> QuantizationReport:
        """On everything written so far."""
        before = self._calibrated.report if self._calibrated else QuantizationReport((), 0, None)
        return replace(before, linears=tuple(self._reports))

    def _scalar(self, tensor: PlannedTensor) -> npt.NDArray[Any]:
        """A scale or zero point of inputs."""
        assert self._calibrated is not None  # or the plan would have no format that rounds inputs
        grid = self._calibrated.records.activation_quantization(self._linears[tensor.parameter].name)
        return np.array(grid.scale if tensor.part == "input_scale" else grid.zero_point, tensor.dtype)

    def _note(self, name: str, values: PlannedTensor, total: _Rounded) -> None:
        linear, form = self._linears.get(name), str(values.format)
        if linear is None:
            return
        if linear.prequantized:
            self._reports.append(LinearReport(linear.name, form, PREQUANTIZED, None, None, None, total.seconds))
        elif linear.format.is_quantized and not self._is_calibrated(linear):
            quality = sqnr(total.noise, total.signal)
            self._reports.append(LinearReport(linear.name, form, "rtn", quality, None, None, total.seconds))

    def _is_calibrated(self, linear: Linear) -> bool:
        return self._calibrated is not None and linear.name in self._calibrated.records

    def _blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """Ranges of a parameter's rows."""
        parameter = self._weights.parameters[name]
        rows = parameter.shape[0]
        step = max(2, BLOCK_ELEMENTS * rows // parameter.size & ~1)  # even: two columns of INT4 share a byte
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def _write_block(self, descriptor: int, tensors: list[PlannedTensor], name: str, start: int, stop: int) -> _Rounded:
        """Write some rows of a parameter: its values, and scales if it has them."""
        started = time.monotonic()
        contents, rounded = self._contents(tensors[0], name, start, stop)
        rounded.seconds = time.monotonic() - started
        for tensor in tensors:
            if tensor.by_column:
                self._columns.write(descriptor, tensor, start, stop, contents[tensor.part])
                continue
            row_bytes = tensor.nbytes // tensor.shape[0]
            _write_at(descriptor, contents[tensor.part], tensor.offset + start * row_bytes)
        parameter = self._weights.parameters[name]
        self._progress.advance((stop - start) * parameter.size // parameter.shape[0])
        return rounded

    def _contents(
        self, values: PlannedTensor, name: str, start: int, stop: int
    ) -> tuple[dict[Part, npt.NDArray[Any]], _Rounded]:
        """Arrays by part, and what rounding did."""
        linear, form = self._linears.get(name), values.format
        if self._calibrated is not None and linear is not None and self._is_calibrated(linear):
            return _parts(self._calibrated.records.rows(linear.name, start, stop), values), _Rounded()
        if linear is not None and linear.prequantized:
            return _parts(self._weights.prequantized_rows(name, start, stop, form), values), _Rounded()
        folded = self._calibrated.records.parameter(name) if self._calibrated is not None else None
        rows = self._weights.rows(name, start, stop) if folded is None else folded[start:stop]
        check_range(name, rows, form)
        if not form.is_quantized:
            return {"values": np.ascontiguousarray(rows, dtype=values.dtype)}, _Rounded()
        packed = quantize(rows, form)
        lost, kept = rows - dequantize(packed, form, rows.shape[1]), rows
        return _parts(packed, values), _Rounded(_square(lost), _square(kept))


def _square(rows: npt.NDArray[np.float32]) -> float:
    """Sum of squares; not by a product of vectors, whose order of adding up depends on the processor."""
    return float(np.square(rows).sum())  # in pairs: float32 is exact enough


class _Columns:
    """Tensors whose blocks are columns: each is put together in memory and written whole. Safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwritten: dict[str, tuple[npt.NDArray[Any], int]] = {}
        """By name, the content so far and how many of its columns are missing."""

    def write(self, descriptor: int, tensor: PlannedTensor, start: int, stop: int, columns: npt.NDArray[Any]) -> None:
        """Take columns ``start`` to ``stop``; after the last ones, write the tensor."""
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
    """Rows as the tensor ``values`` and those beside it hold them."""
    if values.is_for_dequantize_linear:
        inputs = values.shape[0 if values.by_column else 1]
        integers, scales = to_dequantize_linear(packed, values.format, inputs)
        return {"values": integers, "scales": scales}
    parts: dict[Part, npt.NDArray[Any]] = {"values": packed.values, "scales": packed.scales}
    return parts if packed.zero_points is None else parts | {"zero_points": packed.zero_points}


def _by_parameter(file: DataFile, known: Iterable[str]) -> dict[str, list[PlannedTensor]]:
    """The tensors of a data file, values first, that come from each parameter."""
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in file.tensors:
        if tensor.parameter in known and tensor.shape != () and tensor.content is None:
            groups.setdefault(tensor.parameter, []).append(tensor)
    return groups


def _write_at(descriptor: int, content: npt.NDArray[Any], offset: int) -> None:
    """All bytes of an array."""
    write_all(descriptor, np.ascontiguousarray(content).data.cast("B"), offset)
