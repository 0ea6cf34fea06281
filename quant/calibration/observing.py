"""The eager interpreter, watching every quantized linear's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusion_edge.quant.calibration.blocks import BlockOperations
from fusion_edge.quant.equalisation import ChannelRanges, producer
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.input_range import InputRange
from fusion_edge.runtime.config import FusionConfig
from fusion_edge.runtime.errors import FusionError


class Observing(BlockOperations):
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
        self.moments: list[Tensor] = []
        """``[K,K]`` float64 each."""
        self.moments_of: dict[str, int] = {}
        """Index in ``moments`` by linear; linears that share their input share it."""
        self.ranges: dict[str, InputRange] = {}
        """Of the linears whose inputs will be rounded, but for these:"""
        self.channel_ranges: dict[str, ChannelRanges] = {}
        """Of the linears whose inputs can be equalised."""

    def linear(self, x: Tensor, name: str, bias: bool = False) -> Tensor:
        if name in self._formats:
            self._observe(x, name)
        if producer(name, self._formats) is not None:
            self.channel_ranges.setdefault(name, ChannelRanges(x.shape[-1], x.device)).add(x)
        elif name in self._formats and self._formats[name].rounds_inputs:
            self.ranges.setdefault(name, InputRange()).add(x)
        return super().linear(x, name, bias)

    def _observe(self, x: Tensor, name: str) -> None:
        if self._latest is not None and self._latest[0] is x:
            self.moments_of[name] = self._latest[1]
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        if not torch.isfinite(rows).all():
            raise FusionError(
                f"An input of {name} is NaN or infinite; the checkpoint is damaged, or was not meant for float32."
            )
        if name not in self.moments_of:
            self.moments_of[name] = len(self.moments)
            self.moments.append(torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=x.device))
        self.moments[self.moments_of[name]].add_(rows.T @ rows)
        self._latest = x, self.moments_of[name]
