"""NVFP4: FP4 values in blocks of 16, with one FP8 scale a block (E4M3) and one float32 scale a tensor.

A value is ``FP4 * block scale * tensor scale``. Activations are quantized so, too: their block scales while the model
runs, their tensor scale from calibration.

Tensor scales are powers of two. That costs no accuracy, because E4M3 is a float, and the product of both scales is
exact. NVIDIA's tools take the largest value over 6 * 448; here it is rounded up to a power of two.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_edge.quant import float4, float8
from fusion_edge.quant.formats import NVFP4_BLOCK, WeightFormat
from fusion_edge.quant.gptq import FactorizedHessian, RoundedRows, round_in_order
from fusion_edge.quant.packing import Packed, pack

FORMAT = WeightFormat("nvfp4", NVFP4_BLOCK)
SMALLEST_BLOCK_SCALE = 2.0**-9
"""Of a weight: TensorRT's parser requires positive scales."""
CLIP_RATIOS = torch.linspace(1.0, 0.5, 21).tolist()
"""Shares of a block's largest weight that a scale search lets 6 stand for."""


LEAST_TENSOR_SCALE = 2.0**-110
"""Its product with the least E4M3 number, 2^-9, is a normal float32, so scales of blocks are exact."""


def tensor_scale(largest: float) -> float:
    """Return the least power of two with which blocks represent values up to ``largest``; 1 for 0.

    It is at least :data:`LEAST_TENSOR_SCALE`. Weights that need a smaller one become 0.
    """
    if largest == 0:
        return 1.0
    mantissa, exponent = math.frexp(largest / (float4.LARGEST * float(float8.LARGEST)))
    return max(2.0 ** (exponent - (mantissa == 0.5)), LEAST_TENSOR_SCALE)


def common_scale(scales: npt.NDArray[np.floating]) -> float:
    """Return the tensor scale of :attr:`Packed.scales`, of all rows of a weight.

    It is that of :func:`quantize`, or a smaller one that represents them, too.
    """
    return tensor_scale(float4.LARGEST * float(scales.max()))


def round_to_float4(x: Tensor) -> Tensor:
    """Round to the nearest value of E2M1, ties to even; clip at both ends."""
    magnitude = x.abs()
    steps = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return (x.clamp(-float4.LARGEST, float4.LARGEST) / steps).round() * steps


def round_to_float8(x: Tensor) -> Tensor:
    """Round not negative values to the nearest of E4M3, ties to even; clip at the largest."""
    return x.clamp(max=float(float8.LARGEST)).to(torch.float8_e4m3fn).float()


def fake_quantize(x: Tensor, scale: float) -> Tensor:
    """Quantize and dequantize activations ``[...,K]`` with their tensor scale; K is a multiple of 16."""
    blocks = _blocks(x.float())
    ratio = blocks.abs().amax(-1, keepdim=True) / (float4.LARGEST * scale)
    scales = round_to_float8(ratio) * scale
    # A block scale of 0 makes all values 0, whatever is divided by.
    values = round_to_float4(blocks / scales.where(scales > 0, 1)) * scales
    return values.flatten(-2).to(x.dtype)


def quantize(weights: Tensor, scale: float, hessian: FactorizedHessian | None) -> RoundedRows:
    """Quantize rows ``[n,K]`` float32 with a tensor scale: GPTQ, or to nearest without a Hessian.

    GPTQ searches the scales of all blocks first, and rounds columns in order. Coordinate descent (``quant/gptq.py``)
    does not follow: it needs evenly spaced values.
    """
    if hessian is None:
        scales = _covering(_blocks(weights), scale)
        values = round_to_float4(_blocks(weights) / scales).flatten(1)
    else:
        weights = weights.clone()
        weights[:, hessian.dead] = 0
        scales = _search(weights, hessian.cost, scale)
        values = _round_columns(weights, scales, hessian)
    codes = torch.from_numpy(float4.encode(values.cpu().numpy())).reshape(len(weights), -1, NVFP4_BLOCK).numpy()
    packed = Packed(pack(codes, FORMAT), scales.squeeze(-1).cpu().numpy())
    return RoundedRows(packed, (_blocks(values) * scales).flatten(1))


def _blocks(rows: Tensor) -> Tensor:
    """Reshape ``[...,K]`` -> ``[..., K/16, 16]``."""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // NVFP4_BLOCK, NVFP4_BLOCK)


def _covering(blocks: Tensor, scale: float, ratio: float = 1.0) -> Tensor:
    """Return the scales ``[n, K/16, 1]`` with which 6 stands for ``ratio`` times the largest weight of a block."""
    largest = blocks.abs().amax(-1, keepdim=True) * (ratio / (float4.LARGEST * scale))
    return round_to_float8(largest).clamp(min=SMALLEST_BLOCK_SCALE) * scale


def _search(weights: Tensor, cost: Tensor, scale: float) -> Tensor:
    """Return the scales of the least error in each block, each input channel weighted by its cost ``[K]``."""
    blocks, weighting = _blocks(weights), _blocks((cost / cost.mean().clamp_min(1e-30)).float()[None])

    def error(scales: Tensor) -> Tensor:
        rounded = round_to_float4(blocks / scales) * scales
        return ((rounded - blocks).square() * weighting).sum(-1, keepdim=True)

    best = _covering(blocks, scale)
    lowest = error(best)
    for ratio in CLIP_RATIOS[1:]:
        scales = _covering(blocks, scale, ratio)
        found = error(scales)
        best = torch.where(found < lowest, scales, best)
        lowest = torch.minimum(found, lowest)
    return best


def _round_columns(weights: Tensor, scales: Tensor, hessian: FactorizedHessian) -> Tensor:
    """Return FP4 values ``[n,K]``. Rounds columns, most important first, and compensates errors in later ones."""
    order = hessian.order
    columns = weights[:, order].T.contiguous()
    of_columns = scales.squeeze(-1).T.contiguous()[order // NVFP4_BLOCK]
    values = torch.empty_like(weights)
    values[:, order] = round_in_order(columns, hessian.factor, of_columns, torch.zeros_like(of_columns), _nearest).T
    return values


def _nearest(scaled: Tensor, zero: Tensor) -> Tensor:
    return round_to_float4(scaled)
