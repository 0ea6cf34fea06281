"""Observer: the eager interpreter, recording statistics of the inputs of every quantized linear.

In an LLM layer's ``attention.qkv``, a row's weight in the Hessian grows with the attention that it receives (RSQ, Sung
et al. 2025, arXiv:2503.01820). The first row receives most of the attention: its error reaches all rows, yet it is one
row in a thousand. For all other linears, equal weights are better (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusion_edge.export.calibration.blocks import BlockOperations
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.observer import HistogramObserver
from fusion_edge.quant.smoothquant import ChannelHistograms, find_producer
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.errors import FusionError

ATTENTION_WEIGHT = 0.1
"""Weight of received attention. A row's weight is 1 plus this times the attention it receives, 1 on average."""


class Observer(BlockOperations):
    """Accumulates Hessians ``x^T x`` in float64, so that order and number of the samples do not matter."""

    def __init__(
        self,
        config: FusionConfig,
        get: Callable[[str], Tensor],
        embed: Callable[[Tensor], Tensor],
        device: str,
        formats: Mapping[str, WeightFormat],
    ) -> None:
        """``formats`` are those of the linears to observe."""
        super().__init__(config, get, embed, device)
        self._formats = formats
        self._latest: tuple[Tensor, int] | None = None
        self.hessians: list[Tensor] = []
        """``[K,K]`` float64 each."""
        self.hessian_index: dict[str, int] = {}
        """Index in ``hessians``, by linear. Linears that read the same input share a Hessian."""
        self.histograms: dict[str, HistogramObserver] = {}
        """By linear. Its activations are quantized and cannot be smoothed."""
        self.channel_histograms: dict[str, ChannelHistograms] = {}
        """By linear. Its activations are quantized and can be smoothed."""

    def linear(self, x: Tensor, name: str, bias: bool = False) -> Tensor:
        if name in self._formats:
            self._observe(x, name)
        if find_producer(name, self._formats) is not None:
            self.channel_histograms.setdefault(name, ChannelHistograms(x.shape[-1], x.device)).observe(x)
        elif name in self._formats and self._formats[name].quantizes_activations:
            self.histograms.setdefault(name, HistogramObserver()).observe(x)
        return super().linear(x, name, bias)

    def causal_attention(self, qkv: Tensor, layer: int) -> Tensor:
        index = self.hessian_index.get(f"llm.layers.{layer}.attention.qkv")
        if index is not None:
            assert self._latest is not None
            rows = self._latest[0].flatten(0, -2).float()
            received = attention_received(*self.heads(qkv, layer)[:2]).flatten()
            self.hessians[index].add_((rows * received[:, None]).T @ rows, alpha=ATTENTION_WEIGHT)
        return super().causal_attention(qkv, layer)

    def _observe(self, x: Tensor, name: str) -> None:
        if self._latest is not None and self._latest[0] is x:
            self.hessian_index[name] = self._latest[1]
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        if not torch.isfinite(rows).all():
            raise FusionError(
                f"An input of {name} is NaN or infinite: the checkpoint is damaged or overflows float32; fetch or save "
                "it again."
            )
        if name not in self.hessian_index:
            self.hessian_index[name] = len(self.hessians)
            self.hessians.append(torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=x.device))
        self.hessians[self.hessian_index[name]].add_(rows.T @ rows)
        self._latest = x, self.hessian_index[name]


def attention_received(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the causal attention that each row receives from all rows, averaged over heads: ``[B,L]``, sum L.

    ``queries`` ``[B,heads,L,dim]``, ``keys`` ``[B,kv_heads,L,dim]``.
    """
    length, dim = queries.shape[-2:]
    shared = queries.shape[1] // keys.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    received = torch.zeros(len(queries), length, device=queries.device)
    for head in range(queries.shape[1]):  # one head at a time bounds memory: L^2 scores each
        scores = queries[:, head] @ keys[:, head // shared].mT / math.sqrt(dim)
        received += scores.masked_fill_(future, -math.inf).softmax(-1).sum(-2)
    return received / queries.shape[1]
