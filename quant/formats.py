"""The forms in which a weight can be stored, and how they are written in rules (``int4:128``)."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.runtime.errors import UsageError

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "uint4": 4, "w8a8": 8}
GROUPED = ("int8", "int4", "uint4")
"""Kinds whose scales are for groups of input channels. ``uint4`` has a zero point for each group, too."""
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 128
SCALE_BYTES = 2  # scales are stored as float16


@dataclass(frozen=True)
class WeightFormat:
    """``kind`` is a key of :data:`BITS`.

    ``group_size`` is the number of input channels that share a scale: 0 for floats, and for ``w8a8``, where a row has
    one scale and inputs are rounded to 8 bits too, with a scale and a zero point known from calibration.
    """

    kind: str
    group_size: int = 0

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
        """Whether the middle of the integers stands for 0, so that there are no zero points."""
        return self.kind != "uint4"

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

    def packed_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Shape of the stored values, uint8 if quantized: ``[rows, groups, group_size * bits / 8]``."""
        if not self.is_quantized:
            return rows, inputs
        return rows, self.groups(inputs), self.group(inputs) * self.bits // 8

    def __str__(self) -> str:
        return f"{self.kind}:{self.group_size}" if self.group_size else self.kind

    @classmethod
    def parse(cls, text: str, default_group_size: int = DEFAULT_GROUP_SIZE) -> WeightFormat:
        """The name of a kind; the grouped ones may have ``:32``, ``:64`` or ``:128``.

        Raises :class:`UsageError` for anything else.
        """
        kind, _, size = text.partition(":")
        expected = "fp32, fp16, w8a8, int8, int4 or uint4, the last three perhaps with a group size (int4:32)"
        if kind not in BITS or (size and (kind not in GROUPED or size not in map(str, GROUP_SIZES))):
            raise UsageError(f"Unknown weight format {text!r}; expected {expected}.")
        if kind not in GROUPED:
            return cls(kind)
        return cls(kind, int(size) if size else default_group_size)


@dataclass(frozen=True)
class InputGrid:
    """How a linear's inputs are rounded: an integer v from 0 to 255 stands for ``(v - zero_point) * scale``."""

    scale: float
    zero_point: int
