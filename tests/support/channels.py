"""Inputs whose channels differ in scale."""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIERS = [3, 17, 40]
"""Channels of :func:`outliers` with a larger scale."""


def rows(seed: int, count: int, scales: Tensor) -> Tensor:
    """Return normally distributed rows ``[count, K]``, scaled by channel."""
    return torch.randn(count, len(scales), generator=torch.Generator().manual_seed(seed)) * scales


def outliers(channels: int) -> Tensor:
    """Return scales of channels, a few of them 50 times as large as the rest."""
    scales = torch.ones(channels)
    scales[OUTLIERS] = 50
    return scales
