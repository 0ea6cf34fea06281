"""Weight formats, how rules spell them (``int4:128``), and 8-bit quantization of activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fusion_edge.quant import float8
from fusion_edge.runtime.errors import UsageError

BITS = {
    **{"fp32": 32, "fp16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "nf4": 4, "fp4": 4},
    **{"w8a8": 8, "fp8": 8, "nvfp4": 4},
}
"""Bits of a stored value, by kind."""
GROUPED = ("int8", "uint8", "int4", "uint4", "nf4", "fp4")
"""Kinds with a scale per group of input channels. Those with a ``u`` also have a zero point per group."""
CODEBOOKS = ("nf4", "fp4")
"""Kinds whose codes index a table of unevenly spaced values (``quant/codebook.py``)."""
GROUP_SIZES = (32, 64, 128)
"""Group sizes that a user can choose, besides :data:`PER_CHANNEL`."""
STORED_GROUP_SIZES = (16, *GROUP_SIZES, 256)
"""Group sizes that a bundle can hold: weights of prequantized checkpoints keep their groups."""
PER_CHANNEL = 0
"""Group size of one scale per output channel (per row); spelled ``channel``."""
DEFAULT_GROUP_SIZE = 128
CODEBOOK_GROUP_SIZE = 64  # default of bitsandbytes
NVFP4_BLOCK = 16
"""Group size of ``nvfp4``, the only one that GPUs multiply."""
PER_CHANNEL_BLOCK_SIZE = 128
"""Block size of per-channel rows: kernels expect blocks of a power of two, each with a scale."""
LARGEST_FLOAT16 = 65504.0
SYMMETRIC_ZERO_POINT = 128
"""Zero point of symmetric uint8 activations. TensorRT supports no other."""


def group_sizes(sizes: tuple[int, ...] = GROUP_SIZES) -> dict[str, int]:
    """Return ``sizes`` and :data:`PER_CHANNEL`, by spelling."""
    return {str(size): size for size in sizes} | {"channel": PER_CHANNEL}


@dataclass(frozen=True)
class WeightFormat:
    """Format of a stored weight: a ``kind`` of :data:`BITS`, and the number of input channels that share a scale.

    ``group_size`` is :data:`PER_CHANNEL` for one scale per row, and also for floats, ``w8a8`` and ``fp8``. ``w8a8``
    quantizes the linear's activations to 8 bits too, with a scale and a zero point from calibration. ``fp8`` is E4M3
    (``quant/float8.py``). ``nvfp4`` has 4-bit weights and activations (``quant/nvfp4.py``), in :data:`NVFP4_BLOCK`.
    """

    kind: str
    group_size: int = PER_CHANNEL

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return BITS[self.kind]

    @property
    def is_quantized(self) -> bool:
        """Whether values are codes of at most 8 bits, with scales."""
        return self.bits <= 8

    @property
    def is_symmetric(self) -> bool:
        """Whether there are no zero points: the middle code, or the codebook's, means 0."""
        return self.kind not in ("uint4", "uint8")

    @property
    def has_codebook(self) -> bool:
        """Whether codes index a table of unevenly spaced values."""
        return self.kind in CODEBOOKS

    @property
    def is_integer(self) -> bool:
        """Whether values are integers with scales, evenly spaced."""
        return self.is_quantized and not self.has_codebook and self.kind not in ("fp8", "nvfp4")

    @property
    def supports_gptq(self) -> bool:
        """Whether GPTQ rounds to it."""
        return self.is_integer or self.kind == "nvfp4"

    @property
    def is_weight_only_8_bit(self) -> bool:
        """Whether symmetric 8-bit weights meet float activations. TensorRT may dequantize them before the GEMM."""
        return self.bits == 8 and self.is_symmetric and not self.quantizes_activations

    @property
    def scale_dtype(self) -> str:
        """NumPy dtype name of the scales. Those of ``nvfp4`` are products of two, and stored as E4M3."""
        return "float32" if self.has_codebook or self.kind == "nvfp4" else "float16"

    @property
    def scale_bits(self) -> int:
        """Bits of a stored scale."""
        return 8 if self.kind == "nvfp4" else 8 * np.dtype(self.scale_dtype).itemsize

    @property
    def max_value(self) -> float:
        """Largest absolute weight that the format represents; infinity if float16 limits neither values nor scales."""
        if self.kind in ("fp16", "nvfp4"):  # nvfp4 is dequantized to float16 where no GPU multiplies it
            return LARGEST_FLOAT16
        if self.kind == "fp8":
            return LARGEST_FLOAT16 * float(float8.LARGEST)
        has_float16_scales = self.is_quantized and self.scale_dtype == "float16"
        return LARGEST_FLOAT16 * ((1 << (self.bits - 1)) - 1) if has_float16_scales else math.inf

    @property
    def quantizes_activations(self) -> bool:
        """Whether the linear's activations are quantized, too."""
        return self.kind in ("w8a8", "nvfp4")

    def group(self, inputs: int) -> int:
        """Return the number of channels, of ``inputs``, that share a scale."""
        return self.group_size or inputs

    def groups(self, inputs: int) -> int:
        """Return the number of groups along ``inputs`` channels; the last may be partial."""
        return -(-inputs // self.group(inputs))

    @property
    def block_size(self) -> int:
        """Number of channels stored with one scale: a group, or part of a per-channel row; 0 means the whole row."""
        is_divided = self.kind in GROUPED and self.group_size == PER_CHANNEL
        return PER_CHANNEL_BLOCK_SIZE if is_divided else self.group_size

    def block(self, inputs: int) -> int:
        """Return the number of channels, of ``inputs``, that are stored with one scale."""
        return self.block_size or inputs

    def blocks(self, inputs: int) -> int:
        """Return the number of blocks along ``inputs`` channels; the last may be partial."""
        return -(-inputs // self.block(inputs))

    def packed_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Return the shape of the stored values; ``[rows, blocks, block size * bits / 8]`` uint8 if quantized."""
        if not self.is_quantized:
            return rows, inputs
        return rows, self.blocks(inputs), self.block(inputs) * self.bits // 8

    def __str__(self) -> str:
        if self.kind not in GROUPED:
            return self.kind
        return f"{self.kind}:{'channel' if self.group_size == PER_CHANNEL else self.group_size}"

    @classmethod
    def grouped(cls, kind: str, group_size: int | None) -> WeightFormat:
        """Return the format of a kind of :data:`GROUPED`; a ``group_size`` of None is the kind's default.

        Raises :class:`UsageError` for a per-channel codebook: ONNX Runtime has no GEMM for it.
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
        """Parse a kind, optionally with a group size of ``sizes`` (``int4:32``) or ``channel`` (``int4:channel``).

        Raises :class:`UsageError` for anything else.
        """
        kind, _, size = text.partition(":")
        spellings = group_sizes(sizes)
        if kind not in BITS or (size and (kind not in GROUPED or size not in spellings)):
            raise UsageError(
                f"Unknown weight format {text!r}; expected fp32, fp16, fp8, nvfp4, w8a8, or one of "
                f"{', '.join(GROUPED)}, optionally with a group size (int4:32, int4:channel)."
            )
        if kind not in GROUPED:
            return cls(kind, NVFP4_BLOCK if kind == "nvfp4" else PER_CHANNEL)
        return cls.grouped(kind, spellings[size] if size else default_group_size)


@dataclass(frozen=True)
class ActivationQuantization:
    """Quantization of a linear's activations to uint8: a code q means ``(q - zero_point) * scale``."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Nvfp4Activations:
    """Quantization of a linear's activations to NVFP4 (``quant/nvfp4.py``)."""

    scale: float
    """Of the tensor, a power of two."""


InputQuantization = ActivationQuantization | Nvfp4Activations
