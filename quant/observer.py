"""Observer of a linear's activations: a histogram, and the search for the best 8-bit quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_edge.quant import nvfp4
from fusion_edge.quant.formats import (
    LARGEST_FLOAT16,
    SYMMETRIC_ZERO_POINT,
    ActivationQuantization,
    InputQuantization,
    Nvfp4Activations,
)
from fusion_edge.quant.packing import SMALLEST_SCALE

BINS = 4096
CLIP_STEPS = 64  # clipping thresholds tried on either side
LARGEST_CODE = 255


def fake_quantize(x: Tensor, quantization: InputQuantization) -> Tensor:
    """Quantize and dequantize ``x`` as QuantizeLinear and DequantizeLinear do: ties to even, clipped at both ends."""
    if isinstance(quantization, Nvfp4Activations):
        return nvfp4.fake_quantize(x, quantization.scale)
    codes = (x / quantization.scale).round() + quantization.zero_point
    return (codes.clamp(0, LARGEST_CODE) - quantization.zero_point) * quantization.scale


class HistogramObserver:
    """Histogram of all values observed. Its range doubles when a value lies outside."""

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._bound = 0.0  # the histogram covers -bound to bound
        self.minimum, self.maximum = 0.0, 0.0
        """Extremes so far, 0 included: 0 must be exactly representable."""

    def observe(self, x: Tensor) -> None:
        """Count the elements of ``x``, all finite."""
        self.minimum, self.maximum = min(self.minimum, float(x.min())), max(self.maximum, float(x.max()))
        absolute = max(-self.minimum, self.maximum)
        if self._bound == 0:
            self._bound = absolute
        while self._bound < absolute:
            inner = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.nn.functional.pad(inner, (BINS // 4, BINS // 4))
            self._bound *= 2
        if self._bound > 0:
            self._counts += torch.histc(x.float(), BINS, -self._bound, self._bound).double().cpu()

    def quantization(self, symmetric: bool = False) -> ActivationQuantization:
        """Return the quantization with the least squared error over all values observed."""
        return search_quantization(self._counts, self._bound, self.minimum, self.maximum, symmetric)[0]


def search_quantization(
    counts: Tensor, bound: float, minimum: float, maximum: float, symmetric: bool
) -> tuple[ActivationQuantization, float]:
    """Return the quantization with the least squared error over a histogram, and that error.

    ``counts`` ``[n]`` float64 are bins of equal width from ``-bound`` to ``bound``; ``minimum`` <= 0 and ``maximum`` >=
    0 are the extremes. ``symmetric`` fixes the zero point at :data:`SYMMETRIC_ZERO_POINT`. Clipping thresholds are
    searched from the extremes inwards: first for both sides together, then for each side.
    """
    if minimum == maximum:  # only zeros
        return ActivationQuantization(1.0, SYMMETRIC_ZERO_POINT if symmetric else 0), 0.0
    width = 2 * bound / len(counts)
    centers = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * width - bound
    ratios = [1 - i / CLIP_STEPS for i in range(CLIP_STEPS)]

    def error(low: float, high: float) -> float:
        quantization = _covering(minimum * low, maximum * high, symmetric)
        return float(((fake_quantize(centers, quantization) - centers).square() * counts).sum())

    both = min(ratios, key=lambda ratio: error(ratio, ratio))
    if symmetric:
        return _covering(minimum * both, maximum * both, symmetric), error(both, both)
    low = min(ratios, key=lambda ratio: error(ratio, both))
    high = min(ratios, key=lambda ratio: error(low, ratio))
    low, high = min([(both, both), (low, high)], key=lambda ends: error(*ends))
    return _covering(minimum * low, maximum * high, symmetric), error(low, high)


def _covering(minimum: float, maximum: float, symmetric: bool) -> ActivationQuantization:
    """Return the quantization of ``minimum`` <= 0 to ``maximum`` >= 0. The scale is float32; float16 if symmetric."""
    if symmetric:
        ideal = max(-minimum, maximum) / (LARGEST_CODE // 2)
        scale = float(torch.tensor(min(max(ideal, SMALLEST_SCALE), LARGEST_FLOAT16), dtype=torch.float16))
        return ActivationQuantization(scale, SYMMETRIC_ZERO_POINT)
    scale = float(torch.tensor(max((maximum - minimum) / LARGEST_CODE, 1e-12), dtype=torch.float32))
    return ActivationQuantization(scale, min(max(round(-minimum / scale), 0), LARGEST_CODE))
