"""Quantizing a block's linears for what was observed of their inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_edge.export.calibration.observer import Observer
from fusion_edge.export.calibration.weight_store import WeightStore
from fusion_edge.quant import smoothquant
from fusion_edge.quant.formats import ActivationQuantization, WeightFormat
from fusion_edge.quant.gptq import FactorizedHessian, QuantizedRows, gptq, output_error, round_to_nearest
from fusion_edge.quant.smoothquant import ALPHAS, LARGEST_ERROR_RATIO, ChannelHistograms
from fusion_edge.runtime.bundle.quantization_report import LinearReport, sqnr
from fusion_edge.runtime.errors import FusionError

ROWS_AT_ONCE = 2048  # of a linear, quantized together: bounds the memory that lm_head takes


@dataclass(frozen=True)
class Fitted:
    """A linear's weights, quantized for its inputs."""

    rows: list[QuantizedRows]
    squares: npt.NDArray[np.float64]
    """``[4]``: of the weights' errors, the weights, what these errors change in the outputs, the outputs."""


@dataclass(frozen=True)
class Equalised:
    """A linear, quantized for equalised inputs."""

    exponent: float | None
    """None: for inputs as they are."""
    factors: Tensor
    """``[K]``: what the inputs are divided by."""
    fitted: Fitted
    grid: ActivationQuantization
    error: float
    """Squared error of the outputs that rounding weights and inputs makes."""


class LayerQuantizer:
    """Quantizes the linears of one block and saves them."""

    def __init__(
        self,
        formats: Mapping[str, WeightFormat],
        method: str,
        weights: Callable[[str], Tensor],
        records: WeightStore,
        symmetric: bool = False,
    ) -> None:
        """``weights`` returns the float parameter of a name; ``symmetric``: inputs are rounded around 0."""
        self._formats = formats
        self._method = method
        self._weights = weights
        self._records = records
        self._symmetric = symmetric
        self._divided: dict[str, Tensor] = {}

    def quantize(self, observing: Observer) -> list[LinearReport]:
        """Quantize and save every linear observed. Consumes the hessian.

        The last come first: a linear whose outputs are the inputs of an equalised one is itself quantized divided.
        """
        reports: list[LinearReport] = []
        for index in reversed(range(len(observing.hessians))):
            hessian = observing.hessians[index]
            names = [name for name, of in observing.hessian_index.items() if of == index]
            if names[0] in observing.channel_histograms:
                reports.append(self._equalise(names[0], hessian, observing.channel_histograms[names[0]]))
            else:
                reports += self._quantize(names, hessian)
            for name in names:
                if name in observing.ranges:
                    self._records.save_activation_quantization(
                        name, observing.ranges[name].quantization(self._symmetric)
                    )
            observing.hessians[index] = hessian.new_zeros(0)  # its memory is free before the next is factorized
        return reports[::-1]

    def _parameter(self, name: str) -> Tensor:
        return self._divided[name] if name in self._divided else self._weights(name)

    def _quantize(self, names: list[str], hessian: Tensor) -> list[LinearReport]:
        """Quantize and save the linears that share an input, last first."""
        reports, started = [], time.monotonic()
        inputs = self._inputs(names, hessian)
        for name in reversed(names):
            fitted = self._fit(name, self._parameter(f"{name}.weight"), inputs, hessian)
            reports.append(self._save(name, fitted, None, started))
            started = time.monotonic()
        return reports

    def _equalise(self, name: str, hessian: Tensor, ranges: ChannelHistograms) -> LinearReport:
        """Quantize and save a linear with the equalisation that changes its outputs least, and divide its producer."""
        started = time.monotonic()
        as_they_are = self._with_exponent(name, None, hessian, ranges)
        tried = (self._with_exponent(name, exponent, hessian, ranges) for exponent in ALPHAS)
        best = min(tried, key=lambda equalised: equalised.error, default=as_they_are)
        if best.error > LARGEST_ERROR_RATIO * as_they_are.error:
            best = as_they_are
        source = smoothquant.producer(name, self._formats)
        assert source is not None  # or there would be no ranges of channels
        for parameter in smoothquant.producer_parameters(source):
            self._divided[parameter] = smoothquant.divide_last_rows(self._parameter(parameter), best.factors)
        for parameter in smoothquant.float_parameters(source, self._formats):
            self._records.save_parameter(parameter, self._divided[parameter].cpu().numpy())
        self._records.save_activation_quantization(name, best.grid)
        return self._save(name, best.fitted, best.exponent, started)

    def _with_exponent(
        self, name: str, exponent: float | None, hessian: Tensor, ranges: ChannelHistograms
    ) -> Equalised:
        weight = self._parameter(f"{name}.weight")
        by = (
            torch.ones_like(weight[0])
            if exponent is None
            else smoothquant.smoothing_factors(ranges.absmax, weight, exponent)
        )
        weight, hessian = weight * by, hessian / by / by[:, None]
        fitted = self._fit(name, weight, self._inputs([name], hessian), hessian)
        grid, of_inputs = ranges.quantization(by, weight.square().sum(0), self._symmetric)
        return Equalised(exponent, by, fitted, grid, of_inputs + float(fitted.squares[2]))

    def _inputs(self, names: list[str], hessian: Tensor) -> FactorizedHessian | None:
        """What GPTQ, if that is the method of one of them, needs to know of the inputs that linears share."""
        if all(self._method_of(name) != "gptq" for name in names):
            return None
        try:
            return FactorizedHessian(hessian)
        except FusionError as error:
            raise FusionError(f"{names[0]} cannot be calibrated: {error}; check checkpoint and samples.") from None

    def _method_of(self, name: str) -> str:
        """GPTQ is for even grids."""
        return "rtn" if self._formats[name].has_codebook else self._method

    def _fit(self, name: str, weight: Tensor, inputs: FactorizedHessian | None, hessian: Tensor) -> Fitted:
        form, parts, squares = self._formats[name], [], np.zeros(4)
        for rows in torch.split(weight, ROWS_AT_ONCE):
            quantized = (
                gptq(rows, inputs, form) if inputs and self._method_of(name) == "gptq" else round_to_nearest(rows, form)
            )
            difference = rows - quantized.values
            of_weights = [float(x.square().sum(dtype=torch.float64)) for x in (difference, rows)]
            squares += [*of_weights, *output_error(rows, quantized.values, hessian)]
            parts.append(quantized)
        return Fitted(parts, squares)

    def _save(self, name: str, fitted: Fitted, exponent: float | None, started: float) -> LinearReport:
        self._records.save(name, fitted.rows)
        of_weights, of_outputs = sqnr(*fitted.squares[:2]), sqnr(*fitted.squares[2:])
        seconds = time.monotonic() - started
        return LinearReport(
            name, str(self._formats[name]), self._method_of(name), of_weights, of_outputs, exponent, seconds
        )
