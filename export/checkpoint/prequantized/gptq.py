"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

For a weight ``[N,K]`` of b bits in groups of G columns:

- ``qweight`` int32 ``[K*b/32, N]``: column by column, packed along K;
- ``qzeros`` int32 ``[K/G, N*b/32]``: zero points, packed along N. Version 1 stores each minus 1;
- ``scales`` ``[K/G, N]``;
- ``g_idx`` int32 ``[K]``: group of each column. Out of order with ``desc_act``, optional without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.json_fields import JsonFields
from fusion_edge.export.checkpoint.prequantized.grouped_integers import GroupedIntegers, Unpack
from fusion_edge.export.checkpoint.prequantized.int32_packing import int32_count, pack_int32, unpack_int32
from fusion_edge.export.checkpoint.prequantized.layout import ExpectedTensor, PrequantizedTensor
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint

VERSIONS = {"gptq": 1, "gptq_v2": 2}
"""Layout version by ``checkpoint_format``."""


@dataclass(frozen=True)
class GptqLayout:
    """GPTQ's fields of ``quantization_config``."""

    bits: int
    group_size: int
    """Columns per group. -1: a group is a row."""
    version: int
    is_ordered: bool
    """Whether groups are contiguous, without ``desc_act``."""

    @classmethod
    def read(cls, fields: JsonFields) -> GptqLayout:
        """Read the fields. Raises :class:`FusionError` naming one that is not supported."""
        bits = fields.one_of("bits", (4, 8))
        group_size = fields.data.get("group_size")
        if type(group_size) is not int or not (group_size == -1 or group_size >= 1):
            raise fields.invalid("group_size", "-1 or a positive integer")
        versions = {fields.one_of(name, (*VERSIONS, None)) for name in ("checkpoint_format", "format")} - {None}
        if len(versions) > 1:
            raise fields.invalid("format", f"the value of checkpoint_format, {fields.data['checkpoint_format']!r}")
        version = versions.pop() if versions else "gptq"
        fields.one_of("is_marlin_format", (False, None))
        fields.one_of("pack_dtype", ("int32", None))
        dynamic = fields.data.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(pattern.startswith("-:") for pattern in dynamic):
            raise fields.invalid("dynamic", "null, or patterns of float weights, which start with '-:'")
        is_ordered = not fields.one_of("desc_act", (True, False, None))
        return cls(bits, group_size, VERSIONS[version], is_ordered)

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """See :meth:`CheckpointLayout.find`."""
        module, (rows, inputs) = tensor.removesuffix(".weight"), shape
        if f"{module}.qweight" not in checkpoint.tensors:
            return None
        group = inputs if self.group_size == -1 else self.group_size
        index = f"{module}.g_idx"
        return GptqTensor(
            name=f"{module}.qweight",
            rows=rows,
            inputs=inputs,
            bits=self.bits,
            group=group,
            scale_tensor=f"{module}.scales",
            group_index=index if index in checkpoint.tensors or not self.is_ordered else None,
            zero_tensor=f"{module}.qzeros",
            version=self.version,
        )


@dataclass(frozen=True)
class GptqTensor(GroupedIntegers):
    """A weight in GPTQ's layout."""

    zero_tensor: str
    version: int

    @property
    def tensors(self) -> Mapping[str, ExpectedTensor]:
        """See :attr:`PrequantizedTensor.tensors`."""
        groups = -(-self.inputs // self.group)
        expected = {
            self.name: ExpectedTensor((int32_count(self.inputs, self.bits), self.rows), ("I32",)),
            self.zero_tensor: ExpectedTensor((groups, int32_count(self.rows, self.bits)), ("I32",)),
            self.scale_tensor: ExpectedTensor((groups, self.rows)),
        }
        if self.group_index is not None:
            expected[self.group_index] = ExpectedTensor((self.inputs,), ("I32",))
        return expected

    def read_scales(self, checkpoint: Checkpoint) -> npt.NDArray[np.floating]:
        """See :meth:`GroupedIntegers.read_scales`."""
        scales: npt.NDArray[np.floating] = checkpoint.read_stored(self.scale_tensor).T
        return scales

    def read_zero_points(self, checkpoint: Checkpoint) -> npt.NDArray[np.uint8] | None:
        """See :meth:`GroupedIntegers.read_zero_points`. A symmetric weight has all zero points in the middle."""
        zeros = unpack_zeros(checkpoint.read_stored(self.zero_tensor), self.bits, self.rows, self.version)
        return None if (zeros == 1 << (self.bits - 1)).all() else zeros

    def read_values(self, checkpoint: Checkpoint) -> Unpack:
        """See :meth:`GroupedIntegers.read_values`."""
        qweight = checkpoint.read_stored(self.name)
        return lambda start, stop: unpack_weight(qweight[:, start:stop], self.bits, self.inputs)


def pack_weight(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Pack integers ``[N,K]`` into ``qweight``."""
    return np.ascontiguousarray(pack_int32(values, bits).T)


def unpack_weight(qweight: npt.NDArray[np.int32], bits: int, inputs: int) -> npt.NDArray[np.uint8]:
    """Unpack ``qweight`` into integers ``[N,K]``."""
    return unpack_int32(qweight.T, bits, inputs)


def pack_zeros(zeros: npt.NDArray[np.uint8], bits: int, version: int) -> npt.NDArray[np.int32]:
    """Pack zero points ``[N, groups]`` into ``qzeros``."""
    words = pack_int32(zeros.T, bits)
    return words - _ones(bits) if version == 1 else words


def unpack_zeros(qzeros: npt.NDArray[np.int32], bits: int, rows: int, version: int) -> npt.NDArray[np.uint8]:
    """Unpack ``qzeros`` into zero points ``[N, groups]``."""
    words = qzeros + _ones(bits) if version == 1 else qzeros
    zeros: npt.NDArray[np.uint8] = unpack_int32(words, bits, rows).T
    return zeros


def _ones(bits: int) -> npt.NDArray[np.int32]:
    """Return a word of ones, which version 1 subtracts, as an array: sums of arrays wrap around.

    GPTQModel subtracts it from words, not from integers: a zero point of 0 borrows from the next one.
    """
    return pack_int32(np.ones((1, 32 // bits), np.uint8), bits)
