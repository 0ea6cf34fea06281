"""The forms in which a weight can be stored, and how they are written in rules (``int4:128``)."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.runtime.errors import UsageError

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 128
SCALE_BYTES = 2  # scales are stored as float16


@dataclass(frozen=True)
class WeightFormat:
    """``kind`` is a key of :data:`BITS`; ``group_size`` (input channels that share a scale) is 0 for floats."""

    kind: str
    group_size: int = 0

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return BITS[self.kind]

    @property
    def is_quantized(self) -> bool:
        """Whether values are integers with scales."""
        return self.group_size > 0

    def groups(self, inputs: int) -> int:
        """Groups along ``inputs`` channels; the last may be partial."""
        return -(-inputs // self.group_size)

    def packed_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Shape of the stored values, uint8 if quantized: ``[rows, groups, group_size * bits / 8]``."""
        if not self.is_quantized:
            return rows, inputs
        return rows, self.groups(inputs), self.group_size * self.bits // 8

    def __str__(self) -> str:
        return f"{self.kind}:{self.group_size}" if self.is_quantized else self.kind

    @classmethod
    def parse(cls, text: str, default_group_size: int = DEFAULT_GROUP_SIZE) -> WeightFormat:
        """``fp32``, ``fp16``, ``int8``, ``int4``, the latter two with an optional ``:32``, ``:64`` or ``:128``.

        Raises :class:`UsageError` for anything else.
        """
        kind, _, size = text.partition(":")
        expected = "fp32, fp16, int8 or int4, the last two optionally with a group size (int4:32, :64, :128)"
        if kind not in BITS or (size and (BITS[kind] > 8 or size not in map(str, GROUP_SIZES))):
            raise UsageError(f"Unknown weight format {text!r}; expected {expected}.")
        if BITS[kind] > 8:
            return cls(kind)
        return cls(kind, int(size) if size else default_group_size)
