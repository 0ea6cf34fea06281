"""Calibrated weights on disk: NumPy files per linear, and a report per finished block."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.bundle.durable_files import replace_text
from fusion_edge.export.bundle.weight_source import PackedRows, RoundToNearest
from fusion_edge.export.checkpoint.weights import CheckpointWeights
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.quant import nvfp4
from fusion_edge.quant.formats import ActivationQuantization, InputQuantization, Nvfp4Activations, WeightFormat
from fusion_edge.quant.gptq import RoundedRows
from fusion_edge.quant.packing import Packed, dequantize
from fusion_edge.runtime.bundle.quantization_report import LinearReport, QuantizationReport


class WeightStore:
    """A folder of calibrated linears."""

    def __init__(self, folder: Path, formats: Mapping[str, WeightFormat]) -> None:
        self._folder = folder
        self._formats = formats
        self._lock = Lock()  # np.load parses headers as Python code, which is not thread-safe in some releases of 3.11

    def save(self, name: str, rows: list[RoundedRows]) -> None:
        """Save a linear's rows, in order."""
        for part in self._parts(name):
            _save(self._file(name, part), np.concatenate([getattr(some.packed, part) for some in rows]))

    def save_parameter(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """Save a smoothed float parameter, by its name with ``.weight`` or ``.bias``. It replaces the checkpoint's."""
        _save(self._parameter_file(name), values)

    def parameter(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a smoothed float parameter, None if the checkpoint's is unchanged. Safe in several threads."""
        path = self._parameter_file(name)
        if not path.exists():
            return None
        with self._lock:
            values: npt.NDArray[np.float32] = np.load(path)
        return values

    def save_activation_quantization(self, name: str, quantization: InputQuantization) -> None:
        """Save how a linear quantizes its activations."""
        replace_text(self._activation_file(name), json.dumps(asdict(quantization)))

    def activation_quantization(self, name: str) -> InputQuantization:
        """Return how a linear quantizes its activations."""
        kind = Nvfp4Activations if self._formats[name].kind == "nvfp4" else ActivationQuantization
        return kind(**json.loads(self._activation_file(name).read_text(encoding="utf-8")))

    def tensor_scale(self, name: str) -> float:
        """Return the scale of a whole NVFP4 weight. Safe in several threads."""
        with self._lock:
            return nvfp4.common_scale(np.load(self._file(name, "scales")))

    def finish(self, block: str, linears: list[LinearReport]) -> None:
        """Mark a block as finished: all of its linears are saved."""
        replace_text(self._report_file(block), json.dumps([asdict(linear) for linear in linears]))

    def finished(self, block: str) -> list[LinearReport] | None:
        """Return the reports of a block's linears, None if it is not finished."""
        path = self._report_file(block)
        if not path.exists():
            return None
        return [LinearReport(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]

    def __contains__(self, name: str) -> bool:
        return self._file(name, "scales").exists()

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Return rows of a linear. Safe in several threads."""
        with self._lock:
            parts = {part: np.load(self._file(name, part), mmap_mode="r") for part in self._parts(name)}
        return Packed(**{part: np.array(array[start:stop]) for part, array in parts.items()})

    def dequantized(self, name: str, inputs: int) -> npt.NDArray[np.float32]:
        """Return a linear's weights ``[n, inputs]``."""
        packed = Packed(**{part: np.load(self._file(name, part)) for part in self._parts(name)})
        return dequantize(packed, self._formats[name], inputs)

    def _parts(self, name: str) -> tuple[str, ...]:
        """Return the stored fields of :class:`Packed`, in order of writing: ``scales`` last."""
        zero_points = () if self._formats[name].is_symmetric else ("zero_points",)
        return "values", *zero_points, "scales"

    def _file(self, name: str, part: str) -> Path:
        return self._folder / f"{name}.{part}.npy"

    def _parameter_file(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _activation_file(self, name: str) -> Path:
        return self._folder / f"{name}.inputs.json"

    def _report_file(self, block: str) -> Path:
        return self._folder / f"{block}.block.json"


class CalibratedWeights(RoundToNearest):
    """Source of a calibrated bundle: calibrated weights from a store, all others from the checkpoint."""

    def __init__(self, weights: CheckpointWeights, store: WeightStore, report: QuantizationReport) -> None:
        super().__init__(weights)
        self._store = store
        self._report = report

    @property
    def report(self) -> QuantizationReport:
        """Report of the calibration."""
        return self._report

    def with_report(self, report: QuantizationReport) -> CalibratedWeights:
        """Return the same weights with another report."""
        return CalibratedWeights(self._weights, self._store, report)

    def float_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows of a parameter, smoothed where the calibration did so."""
        smoothed = self._store.parameter(name)
        return super().float_rows(name, start, stop) if smoothed is None else smoothed[start:stop]

    def packed_rows(self, linear: Linear, start: int, stop: int) -> PackedRows:
        """Return calibrated rows; the token table is not calibrated."""
        if linear.name in self._store:
            return PackedRows(self._store.rows(linear.name, start, stop))
        return super().packed_rows(linear, start, stop)

    def activation_quantization(self, linear: Linear) -> InputQuantization:
        """Return how a ``w8a8`` or ``nvfp4`` linear quantizes its activations."""
        return self._store.activation_quantization(linear.name)

    def tensor_scale(self, linear: Linear) -> float:
        """Return the scale of a whole ``nvfp4`` weight."""
        return self._store.tensor_scale(linear.name)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
