"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): round weights so that the layer's *output* changes least.

For a linear ``y = W x`` with Hessian ``H = sum x x^T`` over its inputs, the error of quantized weights Q is
``tr((W - Q) H (W - Q)^T)``. Columns are rounded one at a time, most important first; each column's error is compensated
in the columns that follow. Differences from the paper:

- The scales of all groups are fixed before the first column is rounded ("static groups"). Columns are rounded in any
  order and stored in the original order: no permutation at run time.
- A group's scale is searched. It minimizes the squared error, each input channel weighted by the cost of an error there
  after all other channels compensate, ``1 / [H^-1]_jj``.
- Coordinate descent on the same error follows: scales for fixed codes, then codes for fixed scales. It removes another
  6 % of the error (docs/benchmarks.md).
- Damping starts small and increases only if the Cholesky factorization fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusion_edge.quant import packing
from fusion_edge.quant.coordinate_descent import CoordinateDescent
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import SMALLEST_SCALE, Packed, dequantize, quantize
from fusion_edge.runtime.errors import FusionError

COLUMNS_AT_ONCE = 128
DAMPING = 0.01  # relative to the mean of H's diagonal; the paper's value
DAMPING_GROWTH, LARGEST_DAMPING = 10.0, 10.0
CLIP_RATIOS = {4: (0.5, 1.0, 21), 8: (0.9, 1.0, 11)}
"""Clipping ratios of a scale search, by bits: minimum, maximum, count. Ratio 1 covers the extremes of a group."""
SOLVED_DIRECTLY = 256  # rows of a triangular matrix
SEARCH_ELEMENTS = 1 << 18  # weights whose scales are searched at once: fits a core's cache


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """Rows of a quantized linear."""

    packed: Packed
    values: Tensor
    """``[n,K]`` float32, dequantized."""


@dataclass(frozen=True)
class GroupScales:
    """Scales and zero points of all groups: a code q means ``(q - zero) * scale``."""

    scales: Tensor
    """``[n, groups]`` float16."""
    zeros: Tensor
    """``[n, groups]`` float32 integers."""


class FactorizedHessian:
    """Hessian of a linear's inputs, factorized once for all rows."""

    def __init__(self, hessian: Tensor) -> None:
        """``hessian`` ``[K,K]`` float64, up to a positive factor.

        Raises :class:`FusionError` if it is not finite or no allowed damping makes it positive definite.
        """
        if not torch.isfinite(hessian).all():
            raise FusionError("the Hessian of its inputs is not finite")
        self.matrix = hessian
        self.diagonal = hessian.diagonal()
        self.dead = self.diagonal <= 0
        """``[K]``: channels that are always zero."""
        self.order = torch.argsort(self.diagonal, descending=True, stable=True)
        self.factor, self.damping = self._factorize()
        self.cost = torch.empty_like(self.diagonal)
        """``[K]``: cost of a squared weight error after all other channels compensate, ``1 / [H^-1]_jj``."""
        self.cost[self.order] = 1 / self.factor.double().square().sum(0)

    @cached_property
    def damped(self) -> Tensor:
        """``[K,K]`` float32: the damped Hessian, divided by the mean of its diagonal."""
        mean = self.diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = (self.matrix / mean).float()
        damped.diagonal().add_(self.damping + self.dead)
        return damped

    def _factorize(self) -> tuple[Tensor, float]:
        """Return U, upper triangular float32, with ``U^T U`` the inverse of the damped Hessian, and the damping.

        Rows and columns are in rounding order. In reverse order, the lower Cholesky factor L of the Hessian gives U as
        the inverse of L, reversed back.
        """
        backwards = self.order.flip(0)
        dead = self.dead[backwards]
        mean = self.diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny).item()
        damping = DAMPING
        while damping <= LARGEST_DAMPING:
            damped = self.matrix[backwards[:, None], backwards]
            damped.diagonal()[dead] = mean
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                del damped
                inverse = invert_lower(lower)
                if torch.isfinite(inverse).all():
                    return inverse.flip(0, 1).float(), damping
            damping *= DAMPING_GROWTH
        raise FusionError("the Hessian of its inputs is singular at every damping")


def invert_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by recursive halving; a triangular solve takes three times the operations."""
    if len(lower) <= SOLVED_DIRECTLY:
        unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return solved
    half = len(lower) // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = invert_lower(lower[:half, :half])
    inverse[half:, half:] = invert_lower(lower[half:, half:])
    inverse[half:, :half] = -(inverse[half:, half:] @ lower[half:, :half]) @ inverse[:half, :half]
    return inverse


def gptq(weights: Tensor, hessian: FactorizedHessian, fmt: WeightFormat) -> RoundedRows:
    """Quantize rows ``[n,K]`` float32 with GPTQ. Dead channels become zero."""
    weights = weights.clone()
    weights[:, hessian.dead] = 0
    scales = search_scales(weights, hessian.cost, fmt)
    codes = round_columns(weights, hessian, scales, fmt)
    return pack_rows(*coordinate_descent(weights, codes, scales, hessian, fmt), fmt)


def round_columns(weights: Tensor, hessian: FactorizedHessian, groups: GroupScales, fmt: WeightFormat) -> Tensor:
    """Return codes ``[n,K]`` float32. Rounds columns, most important first, and compensates errors in later ones."""
    order = hessian.order
    columns = weights[:, order].T.contiguous()
    group = order // fmt.group(weights.shape[1])
    scales, zeros = (part.float().T.contiguous()[group] for part in (groups.scales, groups.zeros))
    codes = torch.empty_like(weights)
    largest = (1 << fmt.bits) - 1

    def nearest(scaled: Tensor, zero: Tensor) -> Tensor:
        return scaled.round_().add_(zero).clamp_(0, largest)

    codes[:, order] = round_in_order(columns, hessian.factor, scales, zeros, nearest).T
    return codes


def coordinate_descent(
    weights: Tensor, codes: Tensor, groups: GroupScales, hessian: FactorizedHessian, fmt: WeightFormat
) -> tuple[Tensor, GroupScales]:
    """Return codes ``[n,K]`` uint8 and scales with a lower error, by coordinate descent."""
    columns, codes, scales, zeros = (
        part.T.float().clone(memory_format=torch.contiguous_format)
        for part in (weights, codes, groups.scales, groups.zeros)
    )
    descent = CoordinateDescent(columns, codes, scales, zeros, hessian.damped, fmt.group(weights.shape[1]))
    descent.update_codes((1 << fmt.bits) - 1)
    descent.update_scales()
    descent.update_codes((1 << fmt.bits) - 1)
    return descent.codes.T.to(torch.uint8).contiguous(), GroupScales(descent.scales.T.half().contiguous(), groups.zeros)


def round_to_nearest(weights: Tensor, fmt: WeightFormat) -> RoundedRows:
    """Round rows ``[n,K]`` to the nearest values, with scales that cover the extremes of each group."""
    if not fmt.is_integer:
        packed = quantize(weights.cpu().numpy(), fmt)
        return RoundedRows(packed, torch.from_numpy(dequantize(packed, fmt, weights.shape[1])).to(weights.device))
    groups = _covering(*_extremes(_grouped(weights, fmt)), fmt)
    scales, zeros = (_per_weight(part, fmt, weights.shape[1]) for part in (groups.scales, groups.zeros))
    codes = ((weights / scales).round() + zeros).clamp(0, (1 << fmt.bits) - 1)
    return pack_rows(codes.to(torch.uint8), groups, fmt)


def pack_rows(codes: Tensor, groups: GroupScales, fmt: WeightFormat) -> RoundedRows:
    """Pack codes ``[n,K]`` uint8, and dequantize them."""
    columns = codes.shape[1]
    scales, zeros = (_per_weight(part, fmt, columns) for part in (groups.scales, groups.zeros))
    values = (codes.float() - zeros) * scales
    integers, scale, zero = (part.cpu().numpy() for part in (codes, groups.scales, groups.zeros.to(torch.uint8)))
    return RoundedRows(packing.pack_codes(integers, scale, zero, fmt), values)


def search_scales(weights: Tensor, cost: Tensor, fmt: WeightFormat) -> GroupScales:
    """Return the scales and zero points that minimize ``sum cost * error^2`` in each group.

    ``weights`` ``[n,K]`` float32; ``cost`` ``[K]``, not negative.
    """
    step = max(1, SEARCH_ELEMENTS // weights.shape[1])
    weighting = _grouped((cost / cost.mean().clamp_min(1e-30)).float()[None], fmt)
    parts = [_search(_grouped(rows, fmt), weighting, fmt) for rows in torch.split(weights, step)]
    return GroupScales(torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts]))


def _search(grouped: Tensor, cost: Tensor, fmt: WeightFormat) -> GroupScales:
    minimum, maximum = _extremes(grouped)
    best, lowest = _covering(minimum, maximum, fmt), torch.full_like(minimum, torch.inf)
    smallest_ratio, largest_ratio, count = CLIP_RATIOS[fmt.bits]
    for ratio in torch.linspace(largest_ratio, smallest_ratio, count).tolist():
        groups = _covering(minimum * ratio, maximum * ratio, fmt)
        scales, zeros = groups.scales.float()[..., None], groups.zeros[..., None]
        codes = (grouped / scales).round_().add_(zeros).clamp_(0, (1 << fmt.bits) - 1)
        error = codes.sub_(zeros).mul_(scales).sub_(grouped).square_().mul_(cost).sum(2)
        better = error < lowest
        best = GroupScales(
            torch.where(better, groups.scales, best.scales), torch.where(better, groups.zeros, best.zeros)
        )
        lowest = torch.where(better, error, lowest)
    return best


def _extremes(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum (at most 0) and the maximum (at least 0) weight of every group."""
    return grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)


def _covering(minimum: Tensor, maximum: Tensor, fmt: WeightFormat) -> GroupScales:
    """Return the smallest scales that cover both extremes."""
    half = 1 << (fmt.bits - 1)
    if fmt.is_symmetric:
        scales = torch.maximum(maximum / (half - 1), minimum / -half).clamp_min(SMALLEST_SCALE).half()
        return GroupScales(scales, torch.full_like(minimum, half))
    scales = ((maximum - minimum) / (2 * half - 1)).clamp_min(SMALLEST_SCALE).half()
    return GroupScales(scales, (-minimum / scales.float()).round().clamp(0, 2 * half - 1))


def output_error(weights: Tensor, quantized: Tensor, hessian: Tensor) -> tuple[float, float]:
    """Return the squared error of the outputs, and their squared norm: ``tr(E H E^T)``, ``tr(W H W^T)``."""
    narrow = hessian.float()

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ narrow) * matrix).sum(dtype=torch.float64))

    return energy(weights - quantized), energy(weights)


def _grouped(rows: Tensor, fmt: WeightFormat) -> Tensor:
    """Reshape ``[n,K]`` -> ``[n, groups, group_size]``; pad a partial group with zeros."""
    size = fmt.group(rows.shape[1])
    missing = fmt.groups(rows.shape[1]) * size - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)).reshape(len(rows), -1, size)


def _per_weight(part: Tensor, fmt: WeightFormat, columns: int) -> Tensor:
    """Repeat each group's value for its columns: ``[n, groups]`` -> float32 ``[n, columns]``."""
    return part.float().repeat_interleave(fmt.group(columns), 1)[:, :columns]


def round_in_order(
    columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, nearest: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return codes ``[K,n]`` float32, each of which means ``(code - zero) * scale``.

    All tensors are transposed and in rounding order; ``columns`` is overwritten. ``nearest`` returns the codes of a
    column that is divided by its scales, and may overwrite it; its other argument are the zero points.
    """
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, len(columns))
        block, local = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            scale, zero = scales[start + i], zeros[start + i]
            code = nearest(block[i] / scale, zero)
            codes[start + i] = code
            errors[i] = (block[i] - (code - zero) * scale) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
