"""Equalising a linear's input channels (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438).

A grid for a whole tensor has steps as wide as its largest channel asks for. Where inputs come out of a norm, or out of
attention, each channel is linear in some parameters of its *producer*: of the norm, or of the linear that gives the
values (attention mixes positions, never channels). If those are divided by a factor, and the column of the linear that
reads the channel is multiplied by it, both together stay the same function of real numbers. So channels are made
alike: weights may become harder to round, and at run time nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_edge.quant.formats import InputGrid, WeightFormat
from fusion_edge.quant.input_range import BINS, best_grid

EXPONENTS = (0.4, 0.6, 0.8)
"""The inputs' share of a factor (alpha in the paper), tried beside no equalisation. With more than these, the largest
inputs of the samples, which chance has a hand in, decide too much: what others then lose by clipping was measured."""
LARGEST_SHARE = 0.8
"""Of the error without equalisation, that may be left with it, or there is none: chance alone gains some per cent."""
CHANNEL_BINS = 512
SMALLEST_REACH = 2.0**-100  # of a histogram: float32 holds the inverse of its bins' width
CHANNELS_AT_ONCE = 128  # whose histograms are added up together: bounds memory
_PRODUCERS = {"attention.qkv": "attention_norm", "attention.out": "attention.qkv", "mlp.up": "mlp_norm"}
# Of a layer of the vision encoder, by linear.


def producer(linear: str, formats: Mapping[str, WeightFormat]) -> str | None:
    """What can be divided to equalise the inputs of a linear, None if nothing, or if its inputs are not rounded.

    The linear must be the only reader of the producer's outputs. The last K rows of the producer's weight and of its
    bias make the K channels. ``formats`` are those of the linears that are being quantized.
    """
    parts = linear.split(".", 3)
    if parts[:2] != ["vision", "layers"] or parts[-1] not in _PRODUCERS:
        return None
    if linear not in formats or not formats[linear].rounds_inputs:
        return None
    name = ".".join([*parts[:3], _PRODUCERS[parts[-1]]])
    is_norm = name.endswith("_norm")
    return name if is_norm or (name in formats and formats[name].is_quantized) else None


def parameters(producer: str) -> tuple[str, str]:
    """Names of what is divided to equalise a producer's outputs."""
    return f"{producer}.weight", f"{producer}.bias"


def float_parameters(producer: str, formats: Mapping[str, WeightFormat]) -> list[str]:
    """Those among them that are not the weight of a linear, which is quantized."""
    return [name for name in parameters(producer) if name.removesuffix(".weight") not in formats]


def divided(parameter: Tensor, factors: Tensor) -> Tensor:
    """A producer's weight or bias ``[n,...]``, its last K rows divided by ``factors`` ``[K]``."""
    first = len(parameter) - len(factors)
    by_row = factors.reshape(-1, *[1] * (parameter.dim() - 1))
    return torch.cat([parameter[:first], parameter[first:] / by_row])


def factors(extents: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """``max|x_k|^exponent / max|w_k|^(1 - exponent)``, scaled to a geometric mean of 1: ``[K]`` float32.

    ``extents`` ``[K]`` are the largest absolute inputs, ``weights`` is ``[N,K]``. 1 for channels that are always zero.
    """
    largest, extents = weights.abs().amax(0).double(), extents.double()
    live = (extents > 0) & (largest > 0)
    logarithms = exponent * extents.clamp_min(1e-30).log() - (1 - exponent) * largest.clamp_min(1e-30).log()
    logarithms -= logarithms[live].mean() if live.any() else 0
    return logarithms.exp().where(live, 1).float()


class ChannelRanges:
    """Counts the inputs of every channel by value.

    A channel's histogram reaches to a power of two, which doubles when a value lies outside: what is counted does not
    depend on the batches in which it came.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self._counts = torch.zeros(channels, CHANNEL_BINS, dtype=torch.float64, device=device)
        self._reach = torch.zeros(channels, dtype=torch.float64, device=device)  # 0 until there are inputs
        self.least, self.largest = (torch.zeros(channels, device=device) for _ in range(2))
        """``[K]``: extremes so far, 0 included."""

    @property
    def extents(self) -> Tensor:
        """Largest absolute input of every channel, ``[K]``."""
        return torch.maximum(-self.least, self.largest)

    def add(self, x: Tensor) -> None:
        """Count ``[...,K]``, all finite."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.least, self.largest = torch.minimum(self.least, rows.amin(0)), torch.maximum(self.largest, rows.amax(0))
        needed = self.extents.double().clamp_min(SMALLEST_REACH).log2().ceil().exp2()
        self._reach = self._reach.where(self._reach > 0, needed)
        while (short := self._reach < needed).any():
            inner = self._counts[short].reshape(-1, CHANNEL_BINS // 2, 2).sum(2)
            self._counts[short] = torch.nn.functional.pad(inner, (CHANNEL_BINS // 4, CHANNEL_BINS // 4))
            self._reach[short] *= 2
        half = CHANNEL_BINS // 2
        places = (rows * (half / self._reach).float()).add_(half).clamp_(0, CHANNEL_BINS - 1)
        first = torch.arange(0, self._counts.numel(), CHANNEL_BINS, dtype=torch.int32, device=x.device)
        bins = places.to(torch.int32).add_(first)
        self._counts += torch.bincount(bins.flatten(), minlength=self._counts.numel()).reshape(self._counts.shape)

    def grid(self, factors: Tensor, importance: Tensor, symmetric: bool = False) -> tuple[InputGrid, float]:
        """The grid with the least error over all inputs divided by ``factors``, and that error: the sum of
        ``importance * error^2``. Both ``[K]``. ``symmetric`` as of :func:`best_grid`.

        With importance the squared norms of the linear's columns, that is the squared error of its outputs: rounding
        errors of two channels have nothing to do with one another.
        """
        factors = factors.double()
        reach = float((self._reach / factors).max())
        edges = torch.linspace(-reach, reach, BINS + 1, dtype=torch.float64, device=factors.device)
        below = torch.zeros_like(edges)
        parts = [self._counts * importance[:, None].double(), self._reach, factors]
        for counts, reaches, divisors in zip(*(torch.split(part, CHANNELS_AT_ONCE) for part in parts), strict=True):
            below += _counted_below(counts, reaches / divisors, edges).sum(0)
        ends = float((self.least / factors).min()), float((self.largest / factors).max())
        return best_grid(below.diff().cpu(), reach, *ends, symmetric)


def _counted_below(counts: Tensor, reaches: Tensor, edges: Tensor) -> Tensor:
    """Of histograms ``[n,b]`` from ``-reaches`` to ``reaches`` ``[n]``: what lies below ``edges`` ``[m]``, ``[n,m]``.

    Values are taken to be spread evenly over their bin.
    """
    bins = counts.shape[1]
    places = ((edges / reaches.clamp_min(1e-300)[:, None] + 1) * (bins / 2)).clamp_(0, bins)
    low = places.long().clamp_max_(bins - 1)
    before = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    return before.gather(1, low) + (places - low) * counts.gather(1, low)
