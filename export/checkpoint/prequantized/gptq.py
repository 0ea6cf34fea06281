"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

For a weight ``[N,K]`` of b bits in groups of G columns:

- ``qweight`` int32 ``[K*b/32, N]``: column by column, packed along K;
- ``qzeros`` int32 ``[K/G, N*b/32]``: zero points, packed along N. Version 1 stores each less 1;
- ``scales`` ``[K/G, N]``;
- ``g_idx`` int32 ``[K]``: each column's group, out of order with ``desc_act``; without that, it may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.json_fields import Fields
from fusion_edge.export.checkpoint.prequantized.int32_packing import int32_count, pack_int32, unpack_int32
from fusion_edge.export.checkpoint.prequantized.layout import (
    Expected,
    PrequantizedTensor,
    Rows,
    Scales,
    StoredLayout,
    column_order,
    integer_rows,
    scale_dtype,
    stored_group_size,
)
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.quant.formats import WeightFormat

VERSIONS = {"gptq": 1, "gptq_v2": 2}
"""By ``checkpoint_format``."""


@dataclass(frozen=True)
class GptqLayout:
    """What ``quantization_config`` says."""

    bits: int
    group_size: int
    """-1: a group is a row."""
    version: int
    is_ordered: bool
    """Without ``desc_act``: columns lie in the order of their groups."""

    @classmethod
    def read(cls, fields: Fields) -> GptqLayout:
        """Raises :class:`FusionError` naming a field that is not supported."""
        bits = fields.one_of("bits", (4, 8))
        group_size = fields.data.get("group_size")
        if type(group_size) is not int or not (group_size == -1 or group_size >= 1):
            raise fields.wrong("group_size", "-1 or a positive integer")
        versions = {fields.one_of(name, (*VERSIONS, None)) for name in ("checkpoint_format", "format")} - {None}
        if len(versions) > 1:
            raise fields.wrong("format", f"what checkpoint_format says, {fields.data['checkpoint_format']!r}")
        version = versions.pop() if versions else "gptq"
        fields.one_of("is_marlin_format", (False, None))
        fields.one_of("pack_dtype", ("int32", None))
        dynamic = fields.data.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(pattern.startswith("-:") for pattern in dynamic):
            raise fields.wrong("dynamic", "null, or patterns of weights that stay float, which start with '-:'")
        is_ordered = not fields.one_of("desc_act", (True, False, None))
        return cls(bits, group_size, VERSIONS[version], is_ordered)

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """What stands for the weight ``tensor`` of ``shape`` ``[N,K]``; None if it is not quantized."""
        module = tensor.removesuffix(".weight")
        if f"{module}.qweight" not in checkpoint.tensors:
            return None
        rows, inputs = shape
        group = inputs if self.group_size == -1 else self.group_size
        has_groups = f"{module}.g_idx" in checkpoint.tensors or not self.is_ordered
        return Gptq(module, rows, inputs, self.bits, group, self.version, has_groups)


@dataclass(frozen=True)
class Gptq:
    """One weight; see :class:`fusion_edge.export.checkpoint.prequantized.layout.PrequantizedTensor`."""

    module: str
    rows: int
    inputs: int
    bits: int
    group: int
    version: int
    has_groups: bool
    """Whether there is a ``g_idx``."""

    @property
    def tensors(self) -> Mapping[str, Expected]:
        groups = -(-self.inputs // self.group)
        expected = {
            f"{self.module}.qweight": Expected((int32_count(self.inputs, self.bits), self.rows), ("I32",)),
            f"{self.module}.qzeros": Expected((groups, int32_count(self.rows, self.bits)), ("I32",)),
            f"{self.module}.scales": Expected((groups, self.rows)),
        }
        if self.has_groups:
            expected[f"{self.module}.g_idx"] = Expected((self.inputs,), ("I32",))
        return expected

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        columns = self._columns(checkpoint)
        zeros = unpack_zeros(checkpoint.read_stored(f"{self.module}.qzeros"), self.bits, self.rows, self.version)
        sign = "" if (zeros == 1 << (self.bits - 1)).all() else "u"
        size = stored_group_size(f"{self.module}.qweight", self.group, self.inputs)
        dtype = scale_dtype(checkpoint, f"{self.module}.scales")
        return StoredLayout(WeightFormat(f"{sign}int{self.bits}", size), dtype, columns)

    def scales(self, checkpoint: Checkpoint) -> Scales:
        name = f"{self.module}.scales"
        return Scales(name, checkpoint.read_stored(name))

    def open(self, checkpoint: Checkpoint) -> Rows:
        size = stored_group_size(f"{self.module}.qweight", self.group, self.inputs)
        columns = self._columns(checkpoint)
        zeros = unpack_zeros(checkpoint.read_stored(f"{self.module}.qzeros"), self.bits, self.rows, self.version)
        qweight = checkpoint.read_stored(f"{self.module}.qweight")
        scales = checkpoint.read_stored(f"{self.module}.scales").T

        def unpack(start: int, stop: int) -> npt.NDArray[np.uint8]:
            return unpack_weight(qweight[:, start:stop], self.bits, self.inputs)

        return integer_rows(unpack, scales, zeros, (self.group, self.inputs, size), columns)

    def _columns(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        if not self.has_groups:
            return None
        name = f"{self.module}.g_idx"
        return column_order(name, checkpoint.read_stored(name), self.group)


def pack_weight(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Integers ``[N,K]`` -> ``qweight``."""
    return np.ascontiguousarray(pack_int32(values, bits).T)


def unpack_weight(qweight: npt.NDArray[np.int32], bits: int, inputs: int) -> npt.NDArray[np.uint8]:
    """Inverse of :func:`pack_weight`: ``[N,K]``."""
    return unpack_int32(qweight.T, bits, inputs)


def pack_zeros(zeros: npt.NDArray[np.uint8], bits: int, version: int) -> npt.NDArray[np.int32]:
    """Zero points ``[N, groups]`` -> ``qzeros``."""
    words = pack_int32(zeros.T, bits)
    return words - _ones(bits) if version == 1 else words


def unpack_zeros(qzeros: npt.NDArray[np.int32], bits: int, rows: int, version: int) -> npt.NDArray[np.uint8]:
    """Inverse of :func:`pack_zeros`: ``[N, groups]``."""
    words = qzeros + _ones(bits) if version == 1 else qzeros
    zeros: npt.NDArray[np.uint8] = unpack_int32(words, bits, rows).T
    return zeros


def _ones(bits: int) -> npt.NDArray[np.int32]:
    """A word of ones, which version 1 takes off, as an array: sums of those wrap.

    GPTQModel takes it off words, not off integers: where a zero point is 0, the next one is one less.
    """
    return pack_int32(np.ones((1, 32 // bits), np.uint8), bits)
