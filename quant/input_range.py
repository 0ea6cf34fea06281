"""The 8-bit grid of a linear's inputs, from a histogram that grows with what it sees: a few kilobytes a linear."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_edge.quant.formats import LARGEST_FLOAT16, SYMMETRIC_ZERO_POINT, InputGrid
from fusion_edge.quant.packing import SMALLEST_SCALE

BINS = 4096
SHARES = 64  # thresholds that are tried on either side
LARGEST = 255


def round_to_grid(x: Tensor, grid: InputGrid) -> Tensor:
    """``x`` as QuantizeLinear and DequantizeLinear leave it: half to even, ends clipped."""
    codes = (x / grid.scale).round() + grid.zero_point
    return (codes.clamp(0, LARGEST) - grid.zero_point) * grid.scale


class InputRange:
    """Counts inputs by value. The histogram's reach doubles when a value lies outside."""

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._reach = 0.0  # it covers -reach to reach
        self.least, self.largest = 0.0, 0.0
        """Extremes so far, 0 included: the grid must have an exact 0."""

    def add(self, x: Tensor) -> None:
        """Count the elements of ``x``, all finite."""
        self.least, self.largest = min(self.least, float(x.min())), max(self.largest, float(x.max()))
        outermost = max(-self.least, self.largest)
        if self._reach == 0:
            self._reach = outermost
        while self._reach < outermost:
            inner = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.nn.functional.pad(inner, (BINS // 4, BINS // 4))
            self._reach *= 2
        if self._reach > 0:
            self._counts += torch.histc(x.float(), BINS, -self._reach, self._reach).double().cpu()

    def grid(self, symmetric: bool = False) -> InputGrid:
        """The grid with the least squared error over everything counted."""
        return best_grid(self._counts, self._reach, self.least, self.largest, symmetric)[0]


def best_grid(counts: Tensor, reach: float, least: float, largest: float, symmetric: bool) -> tuple[InputGrid, float]:
    """The grid with the least squared error over a histogram, and that error; ``symmetric``: of signed integers
    around 0 alone.

    ``counts`` ``[n]`` float64, of n bins of equal width from ``-reach`` to ``reach``; ``least`` <= 0 and
    ``largest`` >= 0 are the extremes. Thresholds are tried from the extremes inwards: first both sides alike, then
    each side by itself.
    """
    if least == largest:  # nothing but zeros
        return InputGrid(1.0, SYMMETRIC_ZERO_POINT if symmetric else 0), 0.0
    width = 2 * reach / len(counts)
    centres = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * width - reach
    shares = [1 - i / SHARES for i in range(SHARES)]

    def error(low: float, high: float) -> float:
        grid = _grid(least * low, largest * high, symmetric)
        return float(((round_to_grid(centres, grid) - centres).square() * counts).sum())

    both = min(shares, key=lambda share: error(share, share))
    if symmetric:
        return _grid(least * both, largest * both, symmetric), error(both, both)
    low = min(shares, key=lambda share: error(share, both))
    high = min(shares, key=lambda share: error(low, share))
    low, high = min([(both, both), (low, high)], key=lambda ends: error(*ends))
    return _grid(least * low, largest * high, symmetric), error(low, high)


def _grid(least: float, largest: float, symmetric: bool) -> InputGrid:
    """The grid from ``least`` <= 0 to ``largest`` >= 0; the scale as float32 holds it, or float16 if symmetric."""
    if symmetric:
        extent = max(-least, largest) / (LARGEST // 2)
        scale = float(torch.tensor(min(max(extent, SMALLEST_SCALE), LARGEST_FLOAT16), dtype=torch.float16))
        return InputGrid(scale, SYMMETRIC_ZERO_POINT)
    scale = float(torch.tensor(max((largest - least) / LARGEST, 1e-12), dtype=torch.float32))
    return InputGrid(scale, min(max(round(-least / scale), 0), LARGEST))
