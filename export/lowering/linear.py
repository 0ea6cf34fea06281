"""A weight matrix of the model: source of its values, and format in the bundle."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.export.checkpoint.prequantized.layout import StoredLayout
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.quant.formats import WeightFormat


@dataclass(frozen=True)
class Linear:
    """A linear layer's weight, or the token table (:attr:`is_table`)."""

    weight: Parameter
    """Name, shape ``[outputs, inputs]`` and source tensors of the array."""
    format: WeightFormat
    prequantized: StoredLayout | None = None
    """Layout of integers that the checkpoint already holds; None if the export quantizes the weight."""

    @property
    def name(self) -> str:
        """Path in the model, such as ``llm.layers.0.mlp.down``: the name in rules, manifest and reports."""
        return self.weight.linear

    @property
    def outputs(self) -> int:
        """Number of output channels: rows of the weight."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Number of input channels: columns of the weight."""
        return self.weight.shape[1]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.weight.size

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up by token id instead of multiplied."""
        return self.weight.kind == "embedding"

    @property
    def is_quantized_here(self) -> bool:
        """Whether the export quantizes the weight: its format is quantized and the checkpoint's is not."""
        return self.format.is_quantized and self.prequantized is None

    @property
    def scale_dtype(self) -> str:
        """numpy dtype name of the stored scales."""
        return self.format.scale_dtype if self.prequantized is None else self.prequantized.scale_dtype

    @property
    def column_order(self) -> tuple[int, ...] | None:
        """Index in the weight of each stored column; None if the order is the same."""
        return None if self.prequantized is None else self.prequantized.columns
