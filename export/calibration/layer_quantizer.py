"""Layer quantizer: GPTQ or rounding, with SmoothQuant, for the inputs that an observer recorded."""

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
from fusion_edge.quant import nvfp4, smoothquant
from fusion_edge.quant.formats import ActivationQuantization, InputQuantization, Nvfp4Activations, WeightFormat
from fusion_edge.quant.gptq import FactorizedHessian, RoundedRows, gptq, output_error, round_to_nearest
from fusion_edge.quant.observer import HistogramObserver
from fusion_edge.quant.smoothquant import ALPHAS, LARGEST_ERROR_RATIO, ChannelHistograms
from fusion_edge.runtime.bundle.quantization_report import LinearReport, sqnr
from fusion_edge.runtime.errors import FusionError

ROWS_AT_ONCE = 2048  # rows of a linear quantized together: bounds the memory of lm_head


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear's quantized weights and their errors."""

    rows: list[RoundedRows]
    squares: npt.NDArray[np.float64]
    """Sums of squares ``[4]``: weight error, weights, output error, outputs."""


@dataclass(frozen=True)
class SmoothedLinear:
    """A quantized linear whose activations are quantized, and smoothed if ``alpha`` is not None."""

    alpha: float | None
    factors: Tensor
    """Divisors of the activations, ``[K]``."""
    quantized: QuantizedLinear
    activations: ActivationQuantization
    error: float
    """Squared error of the outputs from quantizing weights and activations."""


class LayerQuantizer:
    """Quantizes the linears of one block and saves them."""

    def __init__(
        self,
        formats: Mapping[str, WeightFormat],
        method: str,
        weights: Callable[[str], Tensor],
        store: WeightStore,
        symmetric: bool = False,
    ) -> None:
        """``weights`` returns a float parameter by name. ``symmetric`` quantizes activations around 0."""
        self._formats = formats
        self._method = method
        self._weights = weights
        self._store = store
        self._symmetric = symmetric
        self._smoothed: dict[str, Tensor] = {}

    def quantize(self, observer: Observer) -> list[LinearReport]:
        """Quantize and save every observed linear. Frees the Hessians.

        Goes from the last linear to the first: smoothing a linear divides the parameters of its producer, which is
        quantized afterwards.
        """
        reports: list[LinearReport] = []
        for index in reversed(range(len(observer.hessians))):
            hessian = observer.hessians[index]
            names = [name for name, of in observer.hessian_index.items() if of == index]
            if names[0] in observer.channel_histograms:
                reports.append(self._smooth(names[0], hessian, observer.channel_histograms[names[0]]))
            else:
                reports += self._quantize(names, hessian)
            for name in names:
                if name in observer.histograms:
                    self._store.save_activation_quantization(name, self._activations(name, observer.histograms[name]))
            observer.hessians[index] = hessian.new_zeros(0)  # frees its memory before the next one is factorized
        return reports[::-1]

    def _activations(self, name: str, histogram: HistogramObserver) -> InputQuantization:
        if self._formats[name].kind == "nvfp4":
            return Nvfp4Activations(nvfp4.tensor_scale(max(-histogram.minimum, histogram.maximum)))
        return histogram.quantization(self._symmetric)

    def _parameter(self, name: str) -> Tensor:
        return self._smoothed[name] if name in self._smoothed else self._weights(name)

    def _quantize(self, names: list[str], hessian: Tensor) -> list[LinearReport]:
        """Quantize and save the linears that share an input, last first."""
        reports, started = [], time.monotonic()
        factorized = self._factorize(names, hessian)
        for name in reversed(names):
            quantized = self._quantize_rows(name, self._parameter(f"{name}.weight"), factorized, hessian)
            reports.append(self._save(name, quantized, None, started))
            started = time.monotonic()
        return reports

    def _smooth(self, name: str, hessian: Tensor, histograms: ChannelHistograms) -> LinearReport:
        """Quantize and save a linear with the alpha of the least output error, and divide its producer's parameters."""
        started = time.monotonic()
        unsmoothed = self._with_alpha(name, None, hessian, histograms)
        tried = (self._with_alpha(name, alpha, hessian, histograms) for alpha in ALPHAS)
        best = min(tried, key=lambda smoothed: smoothed.error, default=unsmoothed)
        if best.error > LARGEST_ERROR_RATIO * unsmoothed.error:
            best = unsmoothed
        producer = smoothquant.find_producer(name, self._formats)
        assert producer is not None  # else it would have no channel histograms
        for parameter in smoothquant.producer_parameters(producer):
            self._smoothed[parameter] = smoothquant.divide_last_rows(self._parameter(parameter), best.factors)
        for parameter in smoothquant.float_parameters(producer, self._formats):
            self._store.save_parameter(parameter, self._smoothed[parameter].cpu().numpy())
        self._store.save_activation_quantization(name, best.activations)
        return self._save(name, best.quantized, best.alpha, started)

    def _with_alpha(
        self, name: str, alpha: float | None, hessian: Tensor, histograms: ChannelHistograms
    ) -> SmoothedLinear:
        weight = self._parameter(f"{name}.weight")
        factors = torch.ones_like(weight[0])
        if alpha is not None:
            factors = smoothquant.smoothing_factors(histograms.absmax, weight, alpha)
        weight, hessian = weight * factors, hessian / factors / factors[:, None]
        quantized = self._quantize_rows(name, weight, self._factorize([name], hessian), hessian)
        activations, error = histograms.quantization(factors, weight.square().sum(0), self._symmetric)
        return SmoothedLinear(alpha, factors, quantized, activations, error + float(quantized.squares[2]))

    def _factorize(self, names: list[str], hessian: Tensor) -> FactorizedHessian | None:
        """Return the factorized Hessian that linears share; None if GPTQ quantizes none of them."""
        if all(self._method_of(name) != "gptq" for name in names):
            return None
        try:
            return FactorizedHessian(hessian)
        except FusionError as error:
            raise FusionError(f"{names[0]} cannot be calibrated: {error}; check checkpoint and samples.") from None

    def _method_of(self, name: str) -> str:
        """Return the method of a linear: GPTQ supports not all formats."""
        return self._method if self._formats[name].supports_gptq else "rtn"

    def _quantize_rows(
        self, name: str, weight: Tensor, factorized: FactorizedHessian | None, hessian: Tensor
    ) -> QuantizedLinear:
        fmt, parts, squares = self._formats[name], [], np.zeros(4)
        used = factorized if self._method_of(name) == "gptq" else None
        scale = nvfp4.tensor_scale(float(weight.abs().max())) if fmt.kind == "nvfp4" else None
        for rows in torch.split(weight, ROWS_AT_ONCE):
            if scale is not None:
                quantized = nvfp4.quantize(rows, scale, used)
            else:
                quantized = round_to_nearest(rows, fmt) if used is None else gptq(rows, used, fmt)
            difference = rows - quantized.values
            of_weights = [float(x.square().sum(dtype=torch.float64)) for x in (difference, rows)]
            squares += [*of_weights, *output_error(rows, quantized.values, hessian)]
            parts.append(quantized)
        return QuantizedLinear(parts, squares)

    def _save(self, name: str, quantized: QuantizedLinear, alpha: float | None, started: float) -> LinearReport:
        self._store.save(name, quantized.rows)
        of_weights, of_outputs = sqnr(*quantized.squares[:2]), sqnr(*quantized.squares[2:])
        seconds = time.monotonic() - started
        return LinearReport(
            name, str(self._formats[name]), self._method_of(name), of_weights, of_outputs, alpha, seconds
        )
