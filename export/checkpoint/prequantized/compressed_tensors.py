"""The ``pack-quantized`` layout of compressed-tensors (llm-compressor, vLLM).

For a weight ``[N,K]`` of b bits in groups of G columns, integers stored as v + 2^(b-1):

- ``weight_packed`` int32 ``[N, K*b/32]``, ``weight_scale`` ``[N, K/G]``, ``weight_shape`` int64 ``[2]``;
- ``weight_zero_point`` int32 ``[N*b/32, K/G]``, packed along N, if asymmetric;
- ``weight_g_idx`` int32 ``[K]``, group of each column (all -1: contiguous groups), if ``actorder`` is ``group``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.json_fields import JsonFields
from fusion_edge.export.checkpoint.prequantized.grouped_integers import GroupedIntegers, Unpack
from fusion_edge.export.checkpoint.prequantized.int32_packing import int32_count, pack_int32, unpack_int32
from fusion_edge.export.checkpoint.prequantized.layout import ExpectedTensor, PrequantizedTensor, StoredLayout
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.tokenization.regex_cost import check_regex

_BY_GROUP = ("group", "dynamic", True)  # values of actorder for reordered columns, by release
_REPETITIONS = 3  # consecutive ones in a pattern, which matches names of up to 100 characters


@dataclass(frozen=True)
class QuantizationScheme:
    """How the weights that match ``targets`` are quantized: an entry of ``config_groups``."""

    targets: tuple[str, ...]
    """Names of modules, ``re:`` with a pattern of names, or ``Linear``."""
    bits: int
    group_size: int | None
    """Columns per group. None: a group is a row."""
    is_symmetric: bool
    is_reordered: bool
    """Whether ``weight_g_idx`` assigns columns to groups."""

    @classmethod
    def read(cls, fields: JsonFields) -> QuantizationScheme:
        """Read an entry. Raises :class:`FusionError` naming a field that is not supported."""
        fields.one_of("format", ("pack-quantized", None))
        for name in ("input_activations", "output_activations"):
            fields.one_of(name, (None,))
        targets = fields.data.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise fields.invalid("targets", "a list of names")
        for target in targets:
            if target.startswith("re:") and not _is_fast_pattern(target[3:]):
                raise fields.invalid(
                    "targets", f"fast regular expressions after 're:', with at most {_REPETITIONS} '.*'"
                )
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
        """Return how specifically a target matches a module: 2 by name, 1 as a linear, 0 not at all."""
        if any(re.match(t[3:], module) if t.startswith("re:") else t == module for t in self.targets):
            return 2
        return int("Linear" in self.targets)


def _is_fast_pattern(text: str) -> bool:
    """Return whether ``text`` is a regular expression that matches any name in a short time."""
    try:
        check_regex(text, _REPETITIONS)
        re.compile(text)
    except (ValueError, re.error, RecursionError, OverflowError):
        return False
    return True


@dataclass(frozen=True)
class CompressedTensorsLayout:
    """The fields of ``quantization_config``."""

    schemes: tuple[QuantizationScheme, ...]

    @classmethod
    def read(cls, fields: JsonFields) -> CompressedTensorsLayout:
        """Read the fields. Raises :class:`FusionError` naming one that is not supported."""
        fields.one_of("format", ("pack-quantized",))
        fields.one_of("quantization_status", ("compressed", None))
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if fields.data.get(name):
                raise fields.invalid(name, "null")
        groups = fields.inner("config_groups")
        return cls(tuple(QuantizationScheme.read(groups.inner(name)) for name in groups.data))

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """See :meth:`CheckpointLayout.find`."""
        if f"{tensor}_packed" not in checkpoint.tensors:
            return None
        module, (rows, inputs) = tensor.removesuffix(".weight"), shape
        scheme = max(self.schemes, key=lambda scheme: scheme.rank(module), default=None)
        if scheme is None or not scheme.rank(module):
            raise FusionError(
                f"Tensor {tensor}_packed of {checkpoint.folder} is quantized, but no target of config.json's "
                f"quantization_config.config_groups matches {module}: take both from the same checkpoint."
            )
        index = f"{tensor}_g_idx"
        return CompressedTensor(
            name=tensor,
            rows=rows,
            inputs=inputs,
            bits=scheme.bits,
            group=scheme.group_size or inputs,
            scale_tensor=f"{tensor}_scale",
            group_index=index if index in checkpoint.tensors or scheme.is_reordered else None,
            is_symmetric=scheme.is_symmetric,
        )


@dataclass(frozen=True)
class CompressedTensor(GroupedIntegers):
    """A weight in compressed-tensors' layout."""

    is_symmetric: bool

    @property
    def tensors(self) -> Mapping[str, ExpectedTensor]:
        """See :attr:`PrequantizedTensor.tensors`."""
        groups = -(-self.inputs // self.group)
        expected = {
            f"{self.name}_packed": ExpectedTensor((self.rows, int32_count(self.inputs, self.bits)), ("I32",)),
            self.scale_tensor: ExpectedTensor((self.rows, groups)),
            f"{self.name}_shape": ExpectedTensor((2,), ("I64", "I32")),
        }
        if not self.is_symmetric:
            shape = int32_count(self.rows, self.bits), groups
            expected[f"{self.name}_zero_point"] = ExpectedTensor(shape, ("I32",))
        if self.group_index is not None:
            expected[self.group_index] = ExpectedTensor((self.inputs,), ("I32",))
        return expected

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        """See :meth:`PrequantizedTensor.stored_layout`."""
        shape = checkpoint.read_stored(f"{self.name}_shape").tolist()
        if shape != [self.rows, self.inputs]:
            raise FusionError(
                f"Tensor {self.name}_shape of {checkpoint.folder} is {shape}; config.json requires "
                f"{[self.rows, self.inputs]}. Take config and weights from the same checkpoint."
            )
        return super().stored_layout(checkpoint)

    def read_scales(self, checkpoint: Checkpoint) -> npt.NDArray[np.floating]:
        """See :meth:`GroupedIntegers.read_scales`."""
        return checkpoint.read_stored(self.scale_tensor)

    def read_zero_points(self, checkpoint: Checkpoint) -> npt.NDArray[np.uint8] | None:
        """See :meth:`GroupedIntegers.read_zero_points`."""
        if self.is_symmetric:
            return None
        return unpack_zeros(checkpoint.read_stored(f"{self.name}_zero_point"), self.bits, self.rows)

    def read_values(self, checkpoint: Checkpoint) -> Unpack:
        """See :meth:`GroupedIntegers.read_values`."""
        packed = checkpoint.read_stored(f"{self.name}_packed")
        return lambda start, stop: unpack_int32(packed[start:stop], self.bits, self.inputs)

    def read_columns(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        """See :meth:`GroupedIntegers.read_columns`."""
        if self.group_index is not None and checkpoint.read_stored(self.group_index).max(initial=-1) == -1:
            return None
        return super().read_columns(checkpoint)


def pack_zeros(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Pack zero points ``[N, groups]``, 2^(b-1) added, into ``weight_zero_point``."""
    return np.ascontiguousarray(pack_int32(zeros.T, bits).T)


def unpack_zeros(packed: npt.NDArray[np.int32], bits: int, rows: int) -> npt.NDArray[np.uint8]:
    """Unpack ``weight_zero_point`` into zero points ``[N, groups]``."""
    zeros: npt.NDArray[np.uint8] = unpack_int32(packed.T, bits, rows).T
    return zeros
