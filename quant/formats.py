"""The forms in which a weight can be stored, and how they are written in rules (``int4:128``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusion_edge.runtime.errors import UsageError

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "nf4": 4, "fp4": 4, "w8a8": 8}
GROUPED = ("int8", "uint8", "int4", "uint4", "nf4", "fp4")
"""Kinds whose scales are for groups of input channels. Those with a ``u`` have a zero point for each group, too."""
CODEBOOKS = ("nf4", "fp4")
"""Kinds whose integers stand for unevenly spaced numbers (``quant/codebook.py``)."""
GROUP_SIZES = (32, 64, 128)
"""What a user may ask for, beside :data:`PER_CHANNEL`."""
STORED_GROUP_SIZES = (16, *GROUP_SIZES, 256)
"""What a bundle may hold: weights of quantized checkpoints keep their groups."""
PER_CHANNEL = 0
"""The group size of one scale for each row, that is, for each output channel; written ``channel``."""
DEFAULT_GROUP_SIZE = 128
CODEBOOK_GROUP_SIZE = 64  # by default: that of bitsandbytes
PER_CHANNEL_BLOCK_SIZE = 128
"""What rows with one scale are stored in: kernels want blocks of a power of two, each with its scale."""
LARGEST_FLOAT16 = 65504.0
SYMMETRIC_ZERO_POINT = 128
"""That of inputs whose integers, as signed bytes, stand for multiples of the scale: the only one TensorRT knows."""


def group_sizes(sizes: tuple[int, ...] = GROUP_SIZES) -> dict[str, int]:
    """``sizes`` and :data:`PER_CHANNEL`, by how they are written."""
    return {str(size): size for size in sizes} | {"channel": PER_CHANNEL}


@dataclass(frozen=True)
class WeightFormat:
    """``kind`` is a key of :data:`BITS`.

    ``group_size`` is the number of input channels that share a scale: :data:`PER_CHANNEL` is all of a row. It is also
    that of floats, and of ``w8a8``, where inputs are rounded to 8 bits too, with a scale and a zero point known from
    calibration.
    """

    kind: str
    group_size: int = PER_CHANNEL

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return BITS[self.kind]

    @property
    def is_quantized(self) -> bool:
        """Whether values are integers with scales."""
        return self.bits <= 8

    @property
    def is_symmetric(self) -> bool:
        """Whether there are no zero points: the middle of the integers stands for 0, or a codebook tells."""
        return self.kind not in ("uint4", "uint8")

    @property
    def has_codebook(self) -> bool:
        """Whether integers stand for unevenly spaced numbers."""
        return self.kind in CODEBOOKS

    @property
    def scale_dtype(self) -> str:
        """numpy dtype name of the scales that weights are rounded with."""
        return "float32" if self.has_codebook else "float16"

    @property
    def largest(self) -> float:
        """The largest absolute value of a weight that float16, by itself or as a scale, reaches; else infinity."""
        if self.kind == "fp16":
            return LARGEST_FLOAT16
        has_scales = self.is_quantized and self.scale_dtype == "float16"
        return LARGEST_FLOAT16 * ((1 << (self.bits - 1)) - 1) if has_scales else math.inf

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are integers, too."""
        return self.kind == "w8a8"

    def group(self, inputs: int) -> int:
        """How many of ``inputs`` channels share a scale."""
        return self.group_size or inputs

    def groups(self, inputs: int) -> int:
        """Groups along ``inputs`` channels; the last may be partial."""
        return -(-inputs // self.group(inputs))

    @property
    def block_size(self) -> int:
        """How many channels are stored with one scale: a group, or where groups are rows a part of it; 0 is the row."""
        is_divided = self.kind in GROUPED and self.group_size == PER_CHANNEL
        return PER_CHANNEL_BLOCK_SIZE if is_divided else self.group_size

    def block(self, inputs: int) -> int:
        """How many of ``inputs`` channels are stored with one scale."""
        return self.block_size or inputs

    def blocks(self, inputs: int) -> int:
        """Blocks along ``inputs`` channels; the last may be partial."""
        return -(-inputs // self.block(inputs))

    def packed_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Shape of the stored values, uint8 if quantized: ``[rows, blocks, block size * bits / 8]``."""
        if not self.is_quantized:
            return rows, inputs
        return rows, self.blocks(inputs), self.block(inputs) * self.bits // 8

    def __str__(self) -> str:
        if self.kind not in GROUPED:
            return self.kind
        return f"{self.kind}:{'channel' if self.group_size == PER_CHANNEL else self.group_size}"

    @classmethod
    def grouped(cls, kind: str, group_size: int | None) -> WeightFormat:
        """A kind of :data:`GROUPED`; None is its default size.

        Raises :class:`UsageError` for codebooks with one scale per channel: ONNX Runtime has no product for them.
        """
        if group_size is None:
            group_size = CODEBOOK_GROUP_SIZE if kind in CODEBOOKS else DEFAULT_GROUP_SIZE
        if kind in CODEBOOKS and group_size == PER_CHANNEL:
            sizes = ", ".join(f"{kind}:{size}" for size in GROUP_SIZES)
            raise UsageError(f"{kind} cannot have one scale per channel; use one of {sizes}, or int4:channel.")
        return cls(kind, group_size)

    @classmethod
    def parse(
        cls, text: str, default_group_size: int | None = None, sizes: tuple[int, ...] = GROUP_SIZES
    ) -> WeightFormat:
        """The name of a kind; the grouped ones may have one of ``sizes`` as their group size, such as ``:32``, or
        ``:channel``.

        Raises :class:`UsageError` for anything else.
        """
        kind, _, size = text.partition(":")
        written = group_sizes(sizes)
        if kind not in BITS or (size and (kind not in GROUPED or size not in written)):
            raise UsageError(
                f"Unknown weight format {text!r}; expected fp32, fp16, w8a8, or one of {', '.join(GROUPED)}, perhaps "
                "with a group size (int4:32, int4:channel)."
            )
        if kind not in GROUPED:
            return cls(kind)
        return cls.grouped(kind, written[size] if size else default_group_size)


@dataclass(frozen=True)
class InputGrid:
    """How a linear's inputs are rounded: an integer v from 0 to 255 stands for ``(v - zero_point) * scale``."""

    scale: float
    zero_point: int
