"""Coordinate descent on the output error of a quantized linear. GPTQ's codes and scales are the starting point."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_edge.quant.formats import LARGEST_FLOAT16
from fusion_edge.quant.packing import SMALLEST_SCALE

COLUMNS_AT_ONCE = 128
LARGEST_CHANGE = 0.5  # relative change of a scale per update: keeps it positive


class CoordinateDescent:
    """Minimizes ``tr(E^T H E)``, ``E = W^T - (codes - zeros) * scales``, for all rows of W at once.

    Each update is the exact minimum along one coordinate of every row, so the error never increases. The gradient
    ``H E`` is updated after each column within a block of columns, and with one GEMM per block for the others.
    """

    def __init__(
        self, weights: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, group_size: int
    ) -> None:
        """Take ``weights``, ``codes`` ``[K,n]``, ``scales``, ``zeros`` ``[groups,n]`` and ``hessian`` ``[K,K]``, all
        float32. Overwrites all but the Hessian.
        """
        self.codes = codes
        self.scales = scales
        self._zeros = zeros
        self._hessian = hessian
        self._group_size = group_size
        for group in range(len(scales)):
            rows = self._rows(group)
            weights[rows] -= (codes[rows] - zeros[group]) * scales[group]
        self._gradient = hessian @ weights

    def _rows(self, group: int) -> slice:
        return slice(group * self._group_size, (group + 1) * self._group_size)

    def update_scales(self) -> None:
        """Set each group's scale in turn to the optimum for its codes, unless rounding it to float16 costs more."""
        for group in range(len(self.scales)):
            rows, before = self._rows(group), self.scales[group]
            integers = self.codes[rows] - self._zeros[group]
            slope = (integers * self._gradient[rows]).sum(0)
            curvature = (integers * (self._hessian[rows, rows] @ integers)).sum(0)
            best = before + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
            best = torch.clamp(best, (1 - LARGEST_CHANGE) * before, (1 + LARGEST_CHANGE) * before)
            change = best.clamp(SMALLEST_SCALE, LARGEST_FLOAT16).half().float() - before
            change[change * (2 * slope - change * curvature) <= 0] = 0
            self._gradient.addmm_(self._hessian[:, rows], integers * change, alpha=-1)
            self.scales[group] += change

    def update_codes(self, largest: int) -> None:
        """Set each weight's code in turn to the optimum for its scale, from 0 to ``largest``."""
        count = len(self.codes)
        for start in range(0, count, COLUMNS_AT_ONCE):
            stop = min(start + COLUMNS_AT_ONCE, count)
            local, gradient = self._hessian[start:stop, start:stop], self._gradient[start:stop]
            changes = torch.empty_like(gradient)
            for i in range(stop - start):
                scale, code = self.scales[(start + i) // self._group_size], self.codes[start + i]
                best = (code + gradient[i] / (local[i, i] * scale)).round_().clamp_(0, largest)
                changes[i] = (code - best) * scale
                self.codes[start + i] = best
                gradient.addr_(local[:, i], changes[i])
            for others in (slice(0, start), slice(stop, count)):
                self._gradient[others].addmm_(self._hessian[others, start:stop], changes)
