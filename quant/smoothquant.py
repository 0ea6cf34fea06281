"""SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): move the range of activation channels into the weights.

The largest channel of a tensor sets the scale of all channels. Where a linear reads the output of a norm or of
attention, each channel is linear in some parameters of its *producer*: the norm, or the linear that computes the values
(attention mixes tokens, never channels). Dividing those parameters by a factor and multiplying the linear's column by
it preserves the function in real arithmetic. The channels become similar, the weights may become harder to quantize,
and inference costs the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_edge.quant.formats import ActivationQuantization, WeightFormat
from fusion_edge.quant.observer import BINS, search_quantization

ALPHAS = (0.4, 0.6, 0.8)
"""Values of alpha to try, besides no smoothing. Alpha is the activations' share of a factor. Larger values depend too
much on the extremes of the samples: other inputs are clipped (measured)."""
LARGEST_ERROR_RATIO = 0.8
"""Upper limit of the error with smoothing, relative to without: chance alone gains a few percent."""
CHANNEL_BINS = 512
SMALLEST_BOUND = 2.0**-100  # of a histogram: float32 holds the inverse of its bin width
CHANNELS_AT_ONCE = 128  # histograms summed at once: bounds memory
_PRODUCERS = {"attention.qkv": "attention_norm", "attention.out": "attention.qkv", "mlp.up": "mlp_norm"}
"""Producer by linear, in a layer of the vision encoder."""


def find_producer(linear: str, formats: Mapping[str, WeightFormat]) -> str | None:
    """Return the producer of a linear's activations; None if there is none or the activations are not 8 bits.

    No other linear reads the producer's outputs. The last K rows of the producer's weight and bias compute the K
    channels. ``formats`` are those of the linears that the export quantizes.
    """
    parts = linear.split(".", 3)
    if parts[:2] != ["vision", "layers"] or parts[-1] not in _PRODUCERS:
        return None
    if linear not in formats or formats[linear].kind != "w8a8":
        return None
    name = ".".join([*parts[:3], _PRODUCERS[parts[-1]]])
    is_norm = name.endswith("_norm")
    return name if is_norm or (name in formats and formats[name].is_quantized) else None


def producer_parameters(producer: str) -> tuple[str, str]:
    """Return the names of the producer's parameters to divide."""
    return f"{producer}.weight", f"{producer}.bias"


def float_parameters(producer: str, formats: Mapping[str, WeightFormat]) -> list[str]:
    """Return the names of those that stay float: all except the weight of a linear, which is quantized."""
    weight, bias = producer_parameters(producer)
    return [bias] if producer in formats else [weight, bias]


def divide_last_rows(parameter: Tensor, factors: Tensor) -> Tensor:
    """Return a producer's weight or bias ``[n,...]`` with its last K rows divided by ``factors`` ``[K]``."""
    first = len(parameter) - len(factors)
    per_row = factors.reshape(-1, *[1] * (parameter.dim() - 1))
    return torch.cat([parameter[:first], parameter[first:] / per_row])


def smoothing_factors(absmax: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return ``absmax_k^alpha / max|w_k|^(1 - alpha)``, scaled to a geometric mean of 1: ``[K]`` float32.

    ``absmax`` ``[K]`` are the largest absolute inputs, ``weights`` is ``[N,K]``. Channels that are always zero get 1.
    """
    largest, absmax = weights.abs().amax(0).double(), absmax.double()
    live = (absmax > 0) & (largest > 0)
    logarithms = alpha * absmax.clamp_min(1e-30).log() - (1 - alpha) * largest.clamp_min(1e-30).log()
    logarithms -= logarithms[live].mean() if live.any() else 0
    return logarithms.exp().where(live, 1).float()


class ChannelHistograms:
    """Histogram of each input channel.

    The bound of a channel's histogram is a power of two. It doubles when a value lies outside, so the counts do not
    depend on how the inputs are batched.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self._counts = torch.zeros(channels, CHANNEL_BINS, dtype=torch.float64, device=device)
        self._bound = torch.zeros(channels, dtype=torch.float64, device=device)  # 0 before the first inputs
        self.minimum, self.maximum = (torch.zeros(channels, device=device) for _ in range(2))
        """``[K]``: extremes so far, 0 included."""

    @property
    def absmax(self) -> Tensor:
        """Largest absolute input of each channel, ``[K]``."""
        return torch.maximum(-self.minimum, self.maximum)

    def observe(self, x: Tensor) -> None:
        """Count ``[...,K]``, all finite."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.minimum, self.maximum = (
            torch.minimum(self.minimum, rows.amin(0)),
            torch.maximum(self.maximum, rows.amax(0)),
        )
        needed = self.absmax.double().clamp_min(SMALLEST_BOUND).log2().ceil().exp2()
        self._bound = self._bound.where(self._bound > 0, needed)
        while (short := self._bound < needed).any():
            inner = self._counts[short].reshape(-1, CHANNEL_BINS // 2, 2).sum(2)
            self._counts[short] = torch.nn.functional.pad(inner, (CHANNEL_BINS // 4, CHANNEL_BINS // 4))
            self._bound[short] *= 2
        half = CHANNEL_BINS // 2
        places = (rows * (half / self._bound).float()).add_(half).clamp_(0, CHANNEL_BINS - 1)
        first = torch.arange(0, self._counts.numel(), CHANNEL_BINS, dtype=torch.int32, device=x.device)
        bins = places.to(torch.int32).add_(first)
        self._counts += torch.bincount(bins.flatten(), minlength=self._counts.numel()).reshape(self._counts.shape)

    def quantization(
        self, factors: Tensor, importance: Tensor, symmetric: bool = False
    ) -> tuple[ActivationQuantization, float]:
        """Return the best quantization of all inputs divided by ``factors``, and its error: the sum of
        ``importance * error^2``. Both arguments are ``[K]``; ``symmetric`` as in :func:`search_quantization`.

        With the squared norms of the linear's columns as importance, this is the squared error of its outputs: rounding
        errors of two channels are uncorrelated.
        """
        factors = factors.double()
        bound = float((self._bound / factors).max())
        edges = torch.linspace(-bound, bound, BINS + 1, dtype=torch.float64, device=factors.device)
        below = torch.zeros_like(edges)
        parts = [self._counts * importance[:, None].double(), self._bound, factors]
        for counts, bounds, divisors in zip(*(torch.split(part, CHANNELS_AT_ONCE) for part in parts), strict=True):
            below += _cumulative(counts, bounds / divisors, edges).sum(0)
        ends = float((self.minimum / factors).min()), float((self.maximum / factors).max())
        return search_quantization(below.diff().cpu(), bound, *ends, symmetric)


def _cumulative(counts: Tensor, bounds: Tensor, edges: Tensor) -> Tensor:
    """Count values below ``edges`` ``[m]``, ``[n,m]``, in histograms ``[n,b]`` from ``-bounds`` to ``bounds`` ``[n]``.

    Assumes that values are spread evenly over their bin.
    """
    bins = counts.shape[1]
    places = ((edges / bounds.clamp_min(1e-300)[:, None] + 1) * (bins / 2)).clamp_(0, bins)
    low = places.long().clamp_max_(bins - 1)
    before = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    return before.gather(1, low) + (places - low) * counts.gather(1, low)
