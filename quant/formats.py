"""The forms in which a weight can be stored, and how they are written in rules (``int4:128``)."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.runtime.errors import UsageError

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "nf4": 4, "fp4": 4, "w8a8": 8}
GROUPED = ("int8", "uint8", "int4", "uint4", "nf4", "fp4")
"""Kinds whose scales are for groups of input channels. Those with a ``u`` have a zero point for each group, too."""
CODEBOOKS = ("nf4", "fp4")
"""Kinds whose integers stand for unevenly spaced numbers (``quant/codebook.py``)."""
GROUP_SIZES = (32, 64, 128)
"""What a user may ask for."""
STORED_GROUP_SIZES = (16, *GROUP_SIZES, 256)
"""What a bundle may hold: weights of quantized checkpoints keep their groups."""
DEFAULT_GROUP_SIZE = 128
CODEBOOK_GROUP_SIZE = 64  # by default: that of bitsandbytes


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
    def grouped(cls, kind: str, group_size: int | None) -> WeightFormat:
        """A kind of :data:`GROUPED`; None is its default size."""
        return cls(kind, group_size or (CODEBOOK_GROUP_SIZE if kind in CODEBOOKS else DEFAULT_GROUP_SIZE))

    @classmethod
    def parse(
        cls, text: str, default_group_size: int | None = None, sizes: tuple[int, ...] = GROUP_SIZES
    ) -> WeightFormat:
        """The name of a kind; the grouped ones may have one of ``sizes`` as their group size, such as ``:32``.

        Raises :class:`UsageError` for anything else.
        """
        kind, _, size = text.partition(":")
        expected = f"fp32, fp16, w8a8, or one of {', '.join(GROUPED)}, perhaps with a group size (int4:32)"
        if kind not in BITS or (size and (kind not in GROUPED or size not in map(str, sizes))):
            raise UsageError(f"Unknown weight format {text!r}; expected {expected}.")
        if kind not in GROUPED:
            return cls(kind)
        return cls.grouped(kind, int(size) if size else default_group_size)


@dataclass(frozen=True)
class InputGrid:
    """How a linear's inputs are rounded: an integer v from 0 to 255 stands for ``(v - zero_point) * scale``."""

    scale: float
    zero_point: int
