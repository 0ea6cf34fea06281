"""The layout ``pack-quantized`` of compressed-tensors (llm-compressor, vLLM).

For a weight ``[N,K]`` of b bits in groups of G columns, integers stored as v + 2^(b-1):

- ``weight_packed`` int32 ``[N, K*b/32]``, ``weight_scale`` ``[N, K/G]``, ``weight_shape`` int64 ``[2]``;
- ``weight_zero_point`` int32 ``[N*b/32, K/G]``, packed along N, if asymmetric;
- ``weight_g_idx`` int32 ``[K]``, each column's group (all -1: in order), if ``actorder`` is ``group``.
"""

from __future__ import annotations

import re
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
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.tokenization.regex_cost import check_regex

_BY_GROUP = ("group", "dynamic", True)  # values of actorder, by release
_REPETITIONS = 3  # in a row, in a pattern of names, which have up to a hundred characters


@dataclass(frozen=True)
class Scheme:
    """How the weights that match ``targets`` are quantized."""

    targets: tuple[str, ...]
    """Names of modules, patterns of such behind ``re:``, or ``Linear``."""
    bits: int
    group_size: int | None
    """None: a group is a row."""
    is_symmetric: bool
    is_reordered: bool
    """Whether columns are in the order of their groups only by ``weight_g_idx``."""

    @classmethod
    def read(cls, fields: Fields) -> Scheme:
        """One of ``config_groups``. Raises :class:`FusionError` naming a field that is not supported."""
        fields.one_of("format", ("pack-quantized", None))
        for name in ("input_activations", "output_activations"):
            fields.one_of(name, (None,))
        targets = fields.data.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise fields.wrong("targets", "a list of names")
        for target in targets:
            if target.startswith("re:") and not _is_pattern(target[3:]):
                raise fields.wrong("targets", f"plain regular expressions behind 're:', of up to {_REPETITIONS} '.*'")
        weights = fields.inner("weights")
        weights.one_of("type", ("int",))
        weights.one_of("dynamic", (False, None))
        strategy = weights.one_of("strategy", ("group", "channel"))
        group_size = weights.integer("group_size") if strategy == "group" else None
        bits = weights.one_of("num_bits", (4, 8))
        is_symmetric = weights.one_of("symmetric", (True, False))
        order = weights.one_of("actorder", (*_BY_GROUP, "weight", "static", False, None))
        return cls(tuple(targets), bits, group_size, is_symmetric, order in _BY_GROUP)

    def rank(self, module: str) -> int:
        """How closely a target matches a module: 2 by its name, 1 as a linear, 0 not at all."""
        if any(re.match(t[3:], module) if t.startswith("re:") else t == module for t in self.targets):
            return 2
        return int("Linear" in self.targets)


def _is_pattern(text: str) -> bool:
    """Whether it is a regular expression that the name of a module matches, or does not, in a short time."""
    try:
        check_regex(text, _REPETITIONS)
        re.compile(text)
    except (ValueError, re.error, RecursionError, OverflowError):
        return False
    return True


@dataclass(frozen=True)
class CompressedTensorsLayout:
    """What ``quantization_config`` says."""

    schemes: tuple[Scheme, ...]

    @classmethod
    def read(cls, fields: Fields) -> CompressedTensorsLayout:
        """Raises :class:`FusionError` naming a field that is not supported."""
        fields.one_of("format", ("pack-quantized",))
        fields.one_of("quantization_status", ("compressed", None))
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if fields.data.get(name):
                raise fields.wrong(name, "null")
        groups = fields.inner("config_groups")
        return cls(tuple(Scheme.read(groups.inner(name)) for name in groups.data))

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """What stands for the weight ``tensor`` of ``shape`` ``[N,K]``; None if it is not quantized."""
        if f"{tensor}_packed" not in checkpoint.tensors:
            return None
        module, (rows, inputs) = tensor.removesuffix(".weight"), shape
        scheme = max(self.schemes, key=lambda scheme: scheme.rank(module), default=None)
        if scheme is None or not scheme.rank(module):
            raise FusionError(
                f"{tensor}_packed of {checkpoint.folder} is quantized, but no target of config.json's "
                f"quantization_config.config_groups matches {module}; take both from the same checkpoint."
            )
        is_ordered = f"{tensor}_g_idx" not in checkpoint.tensors and not scheme.is_reordered
        group = scheme.group_size or inputs
        return CompressedTensor(tensor, rows, inputs, scheme.bits, group, scheme.is_symmetric, is_ordered)


@dataclass(frozen=True)
class CompressedTensor:
    """One weight; see :class:`fusion_edge.export.checkpoint.prequantized.layout.PrequantizedTensor`."""

    tensor: str
    rows: int
    inputs: int
    bits: int
    group: int
    is_symmetric: bool
    is_ordered: bool
    """Whether columns lie in the order of their groups, without ``weight_g_idx``."""

    @property
    def tensors(self) -> Mapping[str, Expected]:
        groups = -(-self.inputs // self.group)
        expected = {
            f"{self.tensor}_packed": Expected((self.rows, int32_count(self.inputs, self.bits)), ("I32",)),
            f"{self.tensor}_scale": Expected((self.rows, groups)),
            f"{self.tensor}_shape": Expected((2,), ("I64", "I32")),
        }
        if not self.is_symmetric:
            shape = int32_count(self.rows, self.bits), groups
            expected[f"{self.tensor}_zero_point"] = Expected(shape, ("I32",))
        if not self.is_ordered:
            expected[f"{self.tensor}_g_idx"] = Expected((self.inputs,), ("I32",))
        return expected

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        shape = checkpoint.read_stored(f"{self.tensor}_shape").tolist()
        if shape != [self.rows, self.inputs]:
            raise FusionError(
                f"Tensor {self.tensor}_shape of {checkpoint.folder} is {shape}; config.json asks for "
                f"{[self.rows, self.inputs]}. Config and weights do not belong together."
            )
        dtype = scale_dtype(checkpoint, f"{self.tensor}_scale")
        sign = "" if self.is_symmetric else "u"
        size = stored_group_size(self.tensor, self.group, self.inputs)
        return StoredLayout(WeightFormat(f"{sign}int{self.bits}", size), dtype, self._columns(checkpoint))

    def scales(self, checkpoint: Checkpoint) -> Scales:
        name = f"{self.tensor}_scale"
        return Scales(name, checkpoint.read_stored(name))

    def open(self, checkpoint: Checkpoint) -> Rows:
        size = stored_group_size(self.tensor, self.group, self.inputs)
        columns = self._columns(checkpoint)
        scales = checkpoint.read_stored(f"{self.tensor}_scale")
        if self.is_symmetric:
            zeros = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        else:
            zeros = unpack_zeros(checkpoint.read_stored(f"{self.tensor}_zero_point"), self.bits, self.rows)
        packed = checkpoint.read_stored(f"{self.tensor}_packed")

        def unpack(start: int, stop: int) -> npt.NDArray[np.uint8]:
            return unpack_int32(packed[start:stop], self.bits, self.inputs)

        return integer_rows(unpack, scales, zeros, (self.group, self.inputs, size), columns)

    def _columns(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        name = f"{self.tensor}_g_idx"
        if self.is_ordered or (groups := checkpoint.read_stored(name)).max(initial=-1) == -1:
            return None
        return column_order(name, groups, self.group)


def pack_zeros(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Zero points ``[N, groups]``, 2^(b-1) added, -> ``weight_zero_point``."""
    return np.ascontiguousarray(pack_int32(zeros.T, bits).T)


def unpack_zeros(packed: npt.NDArray[np.int32], bits: int, rows: int) -> npt.NDArray[np.uint8]:
    """Inverse of :func:`pack_zeros`: ``[N, groups]``."""
    zeros: npt.NDArray[np.uint8] = unpack_int32(packed.T, bits, rows).T
    return zeros
