"""The eager interpreter, watching every quantized linear's inputs.

A row of an LLM layer's attention counts the more the more attention it gets (RSQ, Sung et al. 2025, arXiv:2503.01820).
All rows that follow look at the first one, which is to say nothing to them: an error in its value is added to them all,
yet it is one row in a thousand. Other linears are better off with all rows alike (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusion_edge.export.calibration.blocks import BlockOperations
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.observer import HistogramObserver
from fusion_edge.quant.smoothquant import ChannelHistograms, producer
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.errors import FusionError

ATTENTION_SHARE = 0.1
"""What the attention that a row gets counts for, beside the row's own 1. On average a row gets 1."""


class Observer(BlockOperations):
    """Sums up ``x^T x``, in float64 from one sample to the next, so that their order and number do not matter."""

    def __init__(
        self,
        config: FusionConfig,
        get: Callable[[str], Tensor],
        embed: Callable[[Tensor], Tensor],
        device: str,
        formats: Mapping[str, WeightFormat],
    ) -> None:
        """``formats``: of the linears to watch."""
        super().__init__(config, get, embed, device)
        self._formats = formats
        self._latest: tuple[Tensor, int] | None = None
        self.hessians: list[Tensor] = []
        """``[K,K]`` float64 each."""
        self.hessian_index: dict[str, int] = {}
        """Index in ``hessian`` by linear; linears that share their input share it."""
        self.ranges: dict[str, HistogramObserver] = {}
        """Of the linears whose inputs will be rounded, but for these:"""
        self.channel_histograms: dict[str, ChannelHistograms] = {}
        """Of the linears whose inputs can be equalised."""

    def linear(self, x: Tensor, name: str, bias: bool = False) -> Tensor:
        if name in self._formats:
            self._observe(x, name)
        if producer(name, self._formats) is not None:
            self.channel_histograms.setdefault(name, ChannelHistograms(x.shape[-1], x.device)).observe(x)
        elif name in self._formats and self._formats[name].quantizes_activations:
            self.ranges.setdefault(name, HistogramObserver()).observe(x)
        return super().linear(x, name, bias)

    def causal_attention(self, qkv: Tensor, layer: int) -> Tensor:
        index = self.hessian_index.get(f"llm.layers.{layer}.attention.qkv")
        if index is not None:
            assert self._latest is not None
            rows = self._latest[0].flatten(0, -2).float()
            received = attention_received(*self.heads(qkv, layer)[:2]).flatten()
            self.hessians[index].add_((rows * received[:, None]).T @ rows, alpha=ATTENTION_SHARE)
        return super().causal_attention(qkv, layer)

    def _observe(self, x: Tensor, name: str) -> None:
        if self._latest is not None and self._latest[0] is x:
            self.hessian_index[name] = self._latest[1]
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        if not torch.isfinite(rows).all():
            raise FusionError(
                f"An input of {name} is NaN or infinite; the checkpoint is damaged, or was not meant for float32."
            )
        if name not in self.hessian_index:
            self.hessian_index[name] = len(self.hessians)
            self.hessians.append(torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=x.device))
        self.hessians[self.hessian_index[name]].add_(rows.T @ rows)
        self._latest = x, self.hessian_index[name]


def attention_received(queries: Tensor, keys: Tensor) -> Tensor:
    """``[B,L]``: what each row gets of the causal attention of all rows, a mean of the heads; all rows get L together.

    ``queries`` ``[B,heads,L,dim]``, ``keys`` ``[B,kv_heads,L,dim]``.
    """
    length, dim = queries.shape[-2:]
    shared = queries.shape[1] // keys.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    received = torch.zeros(len(queries), length, device=queries.device)
    for head in range(queries.shape[1]):  # one at a time: L^2 scores each
        scores = queries[:, head] @ keys[:, head // shared].mT / math.sqrt(dim)
        received += scores.masked_fill_(future, -math.inf).softmax(-1).sum(-2)
    return received / queries.shape[1]
