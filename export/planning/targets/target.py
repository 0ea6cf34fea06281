"""Base of the targets: everything that depends on the runtime of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion_edge.export.checkpoint.prequantized.layout import StoredLayout
from fusion_edge.export.lowering.base import OnnxOperations
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.quant.formats import PER_CHANNEL, WeightFormat
from fusion_edge.runtime.bundle.config import FusionConfig

ARENA_GROWTH = 2
"""ONNX Runtime's arenas grow by doubling. A 3B bundle with an int8 cache of 1,100 tokens took 4.60 GB; the estimate is
4.81 GB."""


@dataclass(frozen=True)
class Target:
    """A runtime. A subclass overrides methods where a value is not enough."""

    name: str
    """Value of ``--target`` and of the manifest's field ``target``."""
    lowering: type[OnnxOperations]
    """Interpreter that emits the graphs."""
    activations: str
    """numpy dtype name of the values that flow in and between graphs."""
    accuracy_levels: tuple[int, ...]
    """Values of ``--accuracy-level``, the default first."""
    kv_caches: tuple[str, ...] = ("float",)
    """Supported values of ``--kv-cache``, the default first."""
    quantizes_activations: bool = True
    """Whether the runtime supports linears with quantized activations."""
    float_kinds: tuple[str, ...] = ()
    """Kinds of linears in 8 and 4 bits of floating point that the runtime supports."""
    symmetric_activations: bool = False
    """Whether quantized activations have no zero point."""
    int8_per_channel: bool = False
    """Whether 8-bit weights have one scale per output channel, whatever the group size."""
    default_vision: str = "int8-weights"
    """Precision of the vision encoder without samples, a value of ``--vision``."""
    scale_copies: int = 1
    """Copies of each scale that the runtime keeps in memory."""
    context_bytes: int = 0
    """Bytes of a device context, in addition to the process."""

    def int8_format(self, group_size: int | None) -> WeightFormat:
        """Return the format of 8-bit weights."""
        return WeightFormat.grouped("int8", PER_CHANNEL if self.int8_per_channel else group_size)

    def lm_head_format(self, shape: tuple[int, ...], group_size: int | None, is_small: bool) -> WeightFormat:
        """Return the format of ``lm_head``, of ``shape`` ``[outputs, inputs]``, beside 4-bit weights.

        ``is_small``: whether memory matters more than quality.
        """
        return self.int8_format(group_size)

    def stored_layout(self, layout: StoredLayout, inputs: int) -> StoredLayout:
        """Return the layout in which a prequantized weight with ``inputs`` columns is stored for this target."""
        return layout

    def check_formats(self, linears: Mapping[str, Linear]) -> None:
        """Raise :class:`UsageError` for a linear in a format that the runtime does not support."""

    def activation_bytes(self, config: FusionConfig, max_context: int, graph_elements: Sequence[int]) -> int:
        """Return the memory of intermediate arrays; ``graph_elements`` has the number of elements for each graph."""
        return ARENA_GROWTH * sum(graph_elements) * np.dtype(self.activations).itemsize
