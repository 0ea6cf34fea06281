"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): rounding weights so that a layer's *output* changes least.

For a linear ``y = W x`` with second moments ``H = sum x x^T`` of its inputs, the error of quantized weights Q is
``tr((W - Q) H (W - Q)^T)``. Columns are rounded one after the other, each one's error is made good by those that
follow, most important column first. What is done beyond the paper:

- The scales of all groups are fixed before the first column is rounded ("static groups"), so columns may be rounded
  in any order and are still stored in their own: nothing to permute at run time.
- A group's scale is searched, not taken from its extremes: the one that makes the squared error least, each input
  channel weighted by its second moment.
- Damping starts small and grows only if the moments cannot be factorized with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import SMALLEST_SCALE, pack
from fusion_edge.runtime.errors import FusionError

COLUMNS_AT_ONCE = 128
DAMPING = 0.01  # of the mean of H's diagonal; the paper's value
DAMPING_GROWTH, LARGEST_DAMPING = 10.0, 10.0
SCALE_SHARES = {4: (0.5, 1.0, 41), 8: (0.9, 1.0, 11)}
"""By bits: the shares, of the scale that fits a group's extremes, that are tried: least, largest, how many."""
SEARCH_ELEMENTS = 1 << 18  # weights whose scales are searched at once: they stay in a core's cache


@dataclass(frozen=True)
class Quantized:
    """Rows of a linear as they are stored."""

    packed: npt.NDArray[np.uint8]
    """As :func:`fusion_edge.quant.packing.quantize` gives them."""
    scales: npt.NDArray[np.float16]
    values: Tensor
    """``[n,K]`` float32: what they stand for."""


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
                unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
                inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
                if torch.isfinite(inverse).all():
                    return inverse.flip(0, 1).float(), damping
            damping *= DAMPING_GROWTH
        raise FusionError("the second moments of its inputs form a matrix that is singular whatever the damping")


def gptq(weights: Tensor, inputs: Inputs, form: WeightFormat) -> Quantized:
    """Quantize rows ``[n,K]`` float32 for their inputs. Dead channels are stored as zero."""
    weights = weights.clone()
    weights[:, inputs.dead] = 0
    scales = search_scales(weights, inputs.importance, form)
    order = inputs.order
    columns = weights[:, order].T.contiguous()
    by_column = scales.float().T.contiguous()[order // form.group(weights.shape[1])]
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    codes[:, order] = _round_columns(columns, inputs.factor, by_column, form).T
    return store(codes, scales, form)


def nearest(weights: Tensor, form: WeightFormat) -> Quantized:
    """Rows ``[n,K]`` with every weight rounded to the nearest value, scales from the extremes of their groups."""
    scales = _fitting(_grouped(weights, form), form).clamp_min(SMALLEST_SCALE).half()
    half = 1 << (form.bits - 1)
    divided = weights / _by_weight(scales, form, weights.shape[1])
    return store((divided.round().clamp(-half, half - 1) + half).to(torch.uint8), scales, form)


def store(codes: Tensor, scales: Tensor, form: WeightFormat) -> Quantized:
    """Codes ``[n,K]`` uint8 and scales ``[n, groups]`` float16 as they are stored."""
    half, columns = 1 << (form.bits - 1), codes.shape[1]
    values = (codes.float() - half) * _by_weight(scales, form, columns)
    # The rest of a partial group stands for zero.
    missing = form.groups(columns) * form.group(columns) - columns
    padded = torch.nn.functional.pad(codes, (0, missing), value=half)
    grouped = padded.cpu().numpy().reshape(len(codes), -1, form.group(columns))
    return Quantized(pack(grouped, form), scales.cpu().numpy(), values)


def search_scales(weights: Tensor, importance: Tensor, form: WeightFormat) -> Tensor:
    """Scales ``[n, groups]`` float16 that make ``sum importance * error^2`` least, group by group.

    ``weights`` ``[n,K]`` float32; ``importance`` ``[K]``, not negative.
    """
    step = max(1, SEARCH_ELEMENTS // weights.shape[1])
    weighting = _grouped((importance / importance.mean().clamp_min(1e-30)).float()[None], form)
    return torch.cat([_search(_grouped(rows, form), weighting, form) for rows in torch.split(weights, step)])


def _search(grouped: Tensor, importance: Tensor, form: WeightFormat) -> Tensor:
    half = 1 << (form.bits - 1)
    fitting = _fitting(grouped, form)
    best, least = torch.empty_like(fitting), torch.full_like(fitting, torch.inf)
    smallest, largest, count = SCALE_SHARES[form.bits]
    for share in torch.linspace(largest, smallest, count).tolist():
        scales = (fitting * share).clamp_min(SMALLEST_SCALE).half().float()
        error = (grouped / scales[..., None]).round_().clamp_(-half, half - 1).mul_(scales[..., None])
        squared = error.sub_(grouped).square_().mul_(importance).sum(2)
        better = squared < least
        best, least = torch.where(better, scales, best), torch.where(better, squared, least)
    return best.half()


def output_error(weights: Tensor, quantized: Tensor, moments: Tensor) -> tuple[float, float]:
    """Squared error of the outputs and the outputs' own square: ``tr(E H E^T)``, ``tr(W H W^T)``."""
    narrow = moments.float()

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ narrow) * matrix).sum(dtype=torch.float64))

    return energy(weights - quantized), energy(weights)


def _fitting(grouped: Tensor, form: WeightFormat) -> Tensor:
    """The least scales ``[n, groups]`` for which both ends of a group fit."""
    half = 1 << (form.bits - 1)
    return torch.maximum(grouped.amax(2) / (half - 1), grouped.amin(2) / -half)


def _grouped(rows: Tensor, form: WeightFormat) -> Tensor:
    """``[n,K]`` -> ``[n, groups, group_size]``, zeros at the end of a partial group."""
    size = form.group(rows.shape[1])
    missing = form.groups(rows.shape[1]) * size - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)).reshape(len(rows), -1, size)


def _by_weight(scales: Tensor, form: WeightFormat, columns: int) -> Tensor:
    """``[n, groups]`` -> float32 ``[n, columns]``."""
    return scales.float().repeat_interleave(form.group(columns), 1)[:, :columns]


def _round_columns(columns: Tensor, factor: Tensor, scales: Tensor, form: WeightFormat) -> Tensor:
    """Codes ``[K,n]`` uint8. All in the order of rounding, transposed; ``columns`` are consumed."""
    half = 1 << (form.bits - 1)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, len(columns))
        block, local = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            scale = scales[start + i]
            rounded = (block[i] / scale).round_().clamp_(-half, half - 1)
            codes[start + i] = (rounded + half).to(torch.uint8)
            errors[i] = (block[i] - rounded * scale) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
