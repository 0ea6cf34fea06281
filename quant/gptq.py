"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): rounding weights so that a layer's *output* changes least.

For a linear ``y = W x`` with second moments ``H = sum x x^T`` of its inputs, the error of quantized weights Q is
``tr((W - Q) H (W - Q)^T)``. Columns are rounded one after the other, each one's error is made good by those that
follow, most important column first. What is done beyond the paper:

- The scales of all groups are fixed before the first column is rounded ("static groups"), so columns may be rounded
  in any order and are still stored in their own: nothing to permute at run time.
- A group's scale is searched, not taken from its extremes: the one that makes the squared error least, each input
  channel weighted by what an error there costs once all others make it good as far as they can, ``1 / [H^-1]_jj``.
- What came out is refined by coordinate descent on the same error: scales for the integers chosen, then integers for
  these scales, each the best while all others stay. It takes away another 6 % of the error (docs/benchmarks.md).
- Damping starts small and grows only if the moments cannot be factorized with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusion_edge.quant import packing
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import SMALLEST_SCALE, Packed, dequantize, quantize
from fusion_edge.quant.refinement import Refinement
from fusion_edge.runtime.errors import FusionError

COLUMNS_AT_ONCE = 128
DAMPING = 0.01  # of the mean of H's diagonal; the paper's value
DAMPING_GROWTH, LARGEST_DAMPING = 10.0, 10.0
SCALE_SHARES = {4: (0.5, 1.0, 21), 8: (0.9, 1.0, 11)}
"""By bits: the shares, of the scale that fits a group's extremes, that are tried: least, largest, how many."""
SOLVED_DIRECTLY = 256  # rows of a triangular matrix
SEARCH_ELEMENTS = 1 << 18  # weights whose scales are searched at once: they stay in a core's cache


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rows of a linear."""

    packed: Packed
    values: Tensor
    """``[n,K]`` float32: what they stand for."""


@dataclass(frozen=True)
class Grid:
    """Integers v of each group stand for ``(v - zero) * scale``."""

    scales: Tensor
    """``[n, groups]`` float16."""
    zeros: Tensor
    """``[n, groups]`` float32 integers."""


class Inputs:
    """What GPTQ needs to know of a linear's inputs: their second moments, factorized once for all its rows."""

    def __init__(self, moments: Tensor) -> None:
        """``moments`` ``[K,K]`` float64, any positive multiple. Raises :class:`FusionError` if they are not finite or
        cannot be factorized whatever the damping.
        """
        if not torch.isfinite(moments).all():
            raise FusionError("the second moments of its inputs are not finite")
        self.moments = moments
        self.importance = moments.diagonal()
        self.dead = self.importance <= 0
        """``[K]``: channels that never were anything but zero."""
        self.order = torch.argsort(self.importance, descending=True, stable=True)
        self.factor, self.damping = self._factorize()
        self.cost = torch.empty_like(self.importance)
        """``[K]``: of a squared error in a weight, the others adapting: 1 over the diagonal of the inverse moments."""
        self.cost[self.order] = 1 / self.factor.double().square().sum(0)

    @cached_property
    def damped(self) -> Tensor:
        """``[K,K]`` float32: the moments as they were factorized, over the mean of their diagonal."""
        mean = self.importance.mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = (self.moments / mean).float()
        damped.diagonal().add_(self.damping + self.dead)
        return damped

    def _factorize(self) -> tuple[Tensor, float]:
        """Upper triangular U, float32, with ``U^T U`` the inverse of the damped moments, in the order of rounding.

        With the order reversed, the lower Cholesky factor L of the moments gives U as L's inverse, reversed back.
        """
        backwards = self.order.flip(0)
        dead = self.dead[backwards]
        mean = self.importance.mean().clamp_min(torch.finfo(torch.float64).tiny).item()
        damping = DAMPING
        while damping <= LARGEST_DAMPING:
            damped = self.moments[backwards[:, None], backwards]
            damped.diagonal()[dead] = mean
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                del damped
                inverse = invert_lower(lower)
                if torch.isfinite(inverse).all():
                    return inverse.flip(0, 1).float(), damping
            damping *= DAMPING_GROWTH
        raise FusionError("the second moments of its inputs form a matrix that is singular whatever the damping")


def invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix: by halves, for a solver would take three times the operations."""
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


def gptq(weights: Tensor, inputs: Inputs, form: WeightFormat) -> Quantized:
    """Quantize rows ``[n,K]`` float32 for their inputs. Dead channels are stored as zero."""
    weights = weights.clone()
    weights[:, inputs.dead] = 0
    grid = search_grid(weights, inputs.cost, form)
    codes = round_in_order(weights, inputs, grid, form)
    return store(*refine(weights, codes, grid, inputs, form), form)


def round_in_order(weights: Tensor, inputs: Inputs, grid: Grid, form: WeightFormat) -> Tensor:
    """Codes ``[n,K]`` float32: every column rounded, most important first, its error made good by those that follow."""
    order = inputs.order
    columns = weights[:, order].T.contiguous()
    group = order // form.group(weights.shape[1])
    scales, zeros = (part.float().T.contiguous()[group] for part in (grid.scales, grid.zeros))
    codes = torch.empty_like(weights)
    codes[:, order] = _round_columns(columns, inputs.factor, scales, zeros, (1 << form.bits) - 1).T
    return codes


def refine(weights: Tensor, codes: Tensor, grid: Grid, inputs: Inputs, form: WeightFormat) -> tuple[Tensor, Grid]:
    """Codes ``[n,K]`` uint8 and a grid with a lower error."""
    columns, codes, scales, zeros = (
        part.T.float().clone(memory_format=torch.contiguous_format)
        for part in (weights, codes, grid.scales, grid.zeros)
    )
    refinement = Refinement(columns, codes, scales, zeros, inputs.damped, form.group(weights.shape[1]))
    refinement.descend((1 << form.bits) - 1)
    refinement.fit_scales()
    refinement.descend((1 << form.bits) - 1)
    return refinement.codes.T.to(torch.uint8).contiguous(), Grid(refinement.scales.T.half().contiguous(), grid.zeros)


def nearest(weights: Tensor, form: WeightFormat) -> Quantized:
    """Rows ``[n,K]`` with every weight rounded to the nearest value, scales from the extremes of their groups."""
    if form.has_codebook:
        packed = quantize(weights.cpu().numpy(), form)
        return Quantized(packed, torch.from_numpy(dequantize(packed, form, weights.shape[1])).to(weights.device))
    grid = _grid(*_extremes(_grouped(weights, form)), form)
    scales, zeros = (_by_weight(part, form, weights.shape[1]) for part in (grid.scales, grid.zeros))
    codes = ((weights / scales).round() + zeros).clamp(0, (1 << form.bits) - 1)
    return store(codes.to(torch.uint8), grid, form)


def store(codes: Tensor, grid: Grid, form: WeightFormat) -> Quantized:
    """Codes ``[n,K]`` uint8 as they are stored."""
    columns = codes.shape[1]
    scales, zeros = (_by_weight(part, form, columns) for part in (grid.scales, grid.zeros))
    values = (codes.float() - zeros) * scales
    integers, scale, zero = (part.cpu().numpy() for part in (codes, grid.scales, grid.zeros.to(torch.uint8)))
    return Quantized(packing.store(integers, scale, zero, form), values)


def search_grid(weights: Tensor, cost: Tensor, form: WeightFormat) -> Grid:
    """Scales and zeros that make ``sum cost * error^2`` least, group by group.

    ``weights`` ``[n,K]`` float32; ``cost`` ``[K]``, not negative.
    """
    step = max(1, SEARCH_ELEMENTS // weights.shape[1])
    weighting = _grouped((cost / cost.mean().clamp_min(1e-30)).float()[None], form)
    parts = [_search(_grouped(rows, form), weighting, form) for rows in torch.split(weights, step)]
    return Grid(torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts]))


def _search(grouped: Tensor, cost: Tensor, form: WeightFormat) -> Grid:
    least, largest = _extremes(grouped)
    best, lowest = _grid(least, largest, form), torch.full_like(least, torch.inf)
    smallest_share, largest_share, count = SCALE_SHARES[form.bits]
    for share in torch.linspace(largest_share, smallest_share, count).tolist():
        grid = _grid(least * share, largest * share, form)
        scales, zeros = grid.scales.float()[..., None], grid.zeros[..., None]
        codes = (grouped / scales).round_().add_(zeros).clamp_(0, (1 << form.bits) - 1)
        error = codes.sub_(zeros).mul_(scales).sub_(grouped).square_().mul_(cost).sum(2)
        better = error < lowest
        best = Grid(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros))
        lowest = torch.where(better, error, lowest)
    return best


def _extremes(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Least (0 at most) and largest (0 at least) weight of every group."""
    return grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)


def _grid(least: Tensor, largest: Tensor, form: WeightFormat) -> Grid:
    """The grid with the least scale for which both ends fit."""
    half = 1 << (form.bits - 1)
    if form.is_symmetric:
        scales = torch.maximum(largest / (half - 1), least / -half).clamp_min(SMALLEST_SCALE).half()
        return Grid(scales, torch.full_like(least, half))
    scales = ((largest - least) / (2 * half - 1)).clamp_min(SMALLEST_SCALE).half()
    return Grid(scales, (-least / scales.float()).round().clamp(0, 2 * half - 1))


def output_error(weights: Tensor, quantized: Tensor, moments: Tensor) -> tuple[float, float]:
    """Squared error of the outputs and the outputs' own square: ``tr(E H E^T)``, ``tr(W H W^T)``."""
    narrow = moments.float()

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ narrow) * matrix).sum(dtype=torch.float64))

    return energy(weights - quantized), energy(weights)


def _grouped(rows: Tensor, form: WeightFormat) -> Tensor:
    """``[n,K]`` -> ``[n, groups, group_size]``, zeros at the end of a partial group."""
    size = form.group(rows.shape[1])
    missing = form.groups(rows.shape[1]) * size - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)).reshape(len(rows), -1, size)


def _by_weight(part: Tensor, form: WeightFormat, columns: int) -> Tensor:
    """``[n, groups]`` -> float32 ``[n, columns]``."""
    return part.float().repeat_interleave(form.group(columns), 1)[:, :columns]


def _round_columns(columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, largest: int) -> Tensor:
    """Codes ``[K,n]`` float32. All in the order of rounding, transposed; ``columns`` are consumed."""
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, len(columns))
        block, local = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            scale, zero = scales[start + i], zeros[start + i]
            code = (block[i] / scale).round_().add_(zero).clamp_(0, largest)
            codes[start + i] = code
            errors[i] = (block[i] - (code - zero) * scale) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
