"""Calibrated weights as they are kept: NumPy files for each linear, and a file of facts for each finished block."""

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

from fusion_edge.export.calibration.activation_cache import replace_text
from fusion_edge.quant.formats import ActivationQuantization, WeightFormat
from fusion_edge.quant.gptq import QuantizedRows
from fusion_edge.quant.packing import Packed, dequantize
from fusion_edge.runtime.bundle.quantization_report import LinearReport


class WeightStore:
    """A folder of calibrated linears."""

    def __init__(self, folder: Path, formats: Mapping[str, WeightFormat]) -> None:
        self._folder = folder
        self._formats = formats
        self._lock = Lock()  # headers are parsed as Python, which some releases of Python 3.11 can in one thread only

    def save(self, name: str, rows: list[QuantizedRows]) -> None:
        """Keep a linear's rows, in order."""
        for part in self._parts(name):
            _save(self._file(name, part), np.concatenate([getattr(some.packed, part) for some in rows]))

    def save_parameter(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """Keep a float parameter (its name with ``.weight`` or ``.bias``) that takes the place of the checkpoint's."""
        _save(self._parameter_file(name), values)

    def parameter(self, name: str) -> npt.NDArray[np.float32] | None:
        """A float parameter that takes the place of the checkpoint's, None if that one stays.

        Safe in several threads.
        """
        path = self._parameter_file(name)
        if not path.exists():
            return None
        with self._lock:
            values: npt.NDArray[np.float32] = np.load(path)
        return values

    def save_activation_quantization(self, name: str, grid: ActivationQuantization) -> None:
        """Keep the grid of a linear's inputs."""
        replace_text(self._grid_file(name), json.dumps(asdict(grid)))

    def activation_quantization(self, name: str) -> ActivationQuantization:
        """The grid of a linear's inputs."""
        return ActivationQuantization(**json.loads(self._grid_file(name).read_text(encoding="utf-8")))

    def finish(self, block: str, linears: list[LinearReport]) -> None:
        """The block's linears have all been saved."""
        replace_text(self._facts(block), json.dumps([asdict(linear) for linear in linears]))

    def finished(self, block: str) -> list[LinearReport] | None:
        """The linears of a block, None if it was not finished."""
        path = self._facts(block)
        if not path.exists():
            return None
        return [LinearReport(**facts) for facts in json.loads(path.read_text(encoding="utf-8"))]

    def __contains__(self, name: str) -> bool:
        return self._file(name, "scales").exists()

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Some rows of a linear. Safe in several threads."""
        with self._lock:
            parts = {part: np.load(self._file(name, part), mmap_mode="r") for part in self._parts(name)}
        return Packed(**{part: np.array(array[start:stop]) for part, array in parts.items()})

    def dequantized(self, name: str, inputs: int) -> npt.NDArray[np.float32]:
        """A linear's weights ``[n, inputs]``."""
        packed = Packed(**{part: np.load(self._file(name, part)) for part in self._parts(name)})
        return dequantize(packed, self._formats[name], inputs)

    def _parts(self, name: str) -> tuple[str, ...]:
        """Fields of :class:`Packed`, ``scales`` the last to be written."""
        zero_points = () if self._formats[name].is_symmetric else ("zero_points",)
        return "values", *zero_points, "scales"

    def _file(self, name: str, part: str) -> Path:
        return self._folder / f"{name}.{part}.npy"

    def _parameter_file(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _grid_file(self, name: str) -> Path:
        return self._folder / f"{name}.inputs.json"

    def _facts(self, block: str) -> Path:
        return self._folder / f"{block}.block.json"


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
