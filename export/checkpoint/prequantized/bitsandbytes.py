"""The 4-bit layouts of bitsandbytes, NF4 and FP4.

For a weight ``[N,K]``, divided row by row into blocks of B values:

- ``weight`` uint8 ``[N*K/2, 1]``: two integers per byte, the first in the high nibble;
- ``weight.absmax``: float32 ``[N*K/B]``, largest absolute value of each block. Or uint8 (nested): an absmax is
  ``nested_quant_map[v] * nested_absmax[block] + nested_offset``, in blocks of ``nested_blocksize``;
- ``weight.quant_map`` float32 ``[16]``: the codebook;
- ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``): a JSON object as bytes, with the sizes above.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.json_fields import JsonFields
from fusion_edge.export.checkpoint.prequantized.groups import power_of_two_in
from fusion_edge.export.checkpoint.prequantized.layout import (
    ExpectedTensor,
    PrequantizedTensor,
    QuantizedRows,
    RowReader,
    StoredLayout,
    WeightScales,
)
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.quant.codebook import CODES
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.errors import FusionError

LARGEST_BLOCK = 4096  # values; the largest that bitsandbytes writes
LARGEST_STATE = 10_000  # bytes; bitsandbytes writes some hundreds


@dataclass(frozen=True)
class BitsAndBytesLayout:
    """The fields of ``quantization_config``."""

    kind: str
    """Codebook, ``nf4`` or ``fp4``."""

    @classmethod
    def read(cls, fields: JsonFields) -> BitsAndBytesLayout:
        """Read the fields. Raises :class:`FusionError` naming one that is not supported."""
        fields.one_of("load_in_8bit", (False, None))
        fields.one_of("load_in_4bit", (True,))
        fields.one_of("bnb_4bit_quant_storage", ("uint8", None))
        return cls(fields.one_of("bnb_4bit_quant_type", tuple(CODES)))

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """See :meth:`CheckpointLayout.find`."""
        if tensor not in checkpoint.tensors or checkpoint.tensors[tensor].dtype != "U8":
            return None
        rows, inputs = shape
        name = f"{tensor}.quant_state.bitsandbytes__{self.kind}"
        if name not in checkpoint.tensors:
            raise FusionError(
                f"Tensor {name} is missing from {checkpoint.folder}, but {tensor} requires it. Download or save the "
                "checkpoint again."
            )
        return BitsAndBytesTensor(tensor, rows, inputs, self.kind, QuantState.read(checkpoint, name, [rows, inputs]))


@dataclass(frozen=True)
class QuantState:
    """The JSON object that bitsandbytes stores beside a weight."""

    nbytes: int
    """Bytes of the JSON."""
    block: int
    """Values per block."""
    nested_block: int | None
    """Blocks per block of absmax. None: absmax is not quantized."""
    nested_offset: float

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str, shape: list[int]) -> QuantState:
        """Read the object. Raises :class:`FusionError` if it is damaged or belongs to a weight of another shape."""

        def damaged(what: str) -> FusionError:
            return FusionError(
                f"Tensor {name} of {checkpoint.folder} is not a quantization state: {what}. Download or save the "
                "checkpoint again."
            )

        state: Any = None
        info = checkpoint.tensors[name]
        if info.dtype != "U8" or info.nbytes > LARGEST_STATE:
            raise damaged(f"it is not uint8 or has more than {LARGEST_STATE} bytes")
        try:
            state = json.loads(checkpoint.read_stored(name).tobytes())
        except (ValueError, RecursionError):
            raise damaged("it is not valid JSON") from None
        if not isinstance(state, dict) or state.get("shape") != shape:
            raise damaged(f"its shape is not {shape}, as config.json requires")
        sizes = [state.get("blocksize"), state.get("nested_blocksize", 1)]
        for size in sizes:
            if type(size) is not int or not 1 <= size <= LARGEST_BLOCK or size & (size - 1):
                raise damaged(f"a block size is {size!r}; expected a power of two, at most {LARGEST_BLOCK}")
        offset = state.get("nested_offset", 0.0)
        if type(offset) is not float or not math.isfinite(offset):
            raise damaged(f"nested_offset is {offset!r}; expected a finite float")
        nested = sizes[1] if "nested_blocksize" in state else None
        return cls(math.prod(checkpoint.tensors[name].shape), sizes[0], nested, offset)


@dataclass(frozen=True)
class BitsAndBytesTensor:
    """A weight in a layout of bitsandbytes."""

    tensor: str
    rows: int
    inputs: int
    kind: str
    state: QuantState

    @property
    def tensors(self) -> Mapping[str, ExpectedTensor]:
        """See :attr:`PrequantizedTensor.tensors`."""
        count = self.rows * self.inputs
        blocks = -(-count // self.state.block)
        is_nested = self.state.nested_block is not None
        expected = {
            self.tensor: ExpectedTensor((-(-count // 2), 1), ("U8",)),
            f"{self.tensor}.absmax": ExpectedTensor((blocks,), ("U8" if is_nested else "F32",)),
            f"{self.tensor}.quant_map": ExpectedTensor((16,), ("F32",)),
            f"{self.tensor}.quant_state.bitsandbytes__{self.kind}": ExpectedTensor((self.state.nbytes,), ("U8",)),
        }
        if self.state.nested_block is not None:
            nested = -(-blocks // self.state.nested_block)
            expected[f"{self.tensor}.nested_absmax"] = ExpectedTensor((nested,), ("F32",))
            expected[f"{self.tensor}.nested_quant_map"] = ExpectedTensor((256,), ("F32",))
        return expected

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        """See :meth:`PrequantizedTensor.stored_layout`."""
        found = checkpoint.read_stored(f"{self.tensor}.quant_map")
        if not np.array_equal(found, CODES[self.kind]):
            raise FusionError(
                f"Tensor {self.tensor}.quant_map of {checkpoint.folder} is not the codebook of {self.kind}: the "
                "checkpoint is damaged, or from an unsupported release of bitsandbytes. Quantize it again."
            )
        return StoredLayout(WeightFormat(self.kind, self._group()), "float32", None)

    def scales(self, checkpoint: Checkpoint) -> WeightScales:
        """See :meth:`PrequantizedTensor.scales`."""
        absmax = self._absmax(checkpoint)
        if self.state.nested_block is not None:
            absmax = np.abs(absmax)  # a block of zeros may get an absmax slightly below 0
        return WeightScales(f"{self.tensor}.absmax", absmax, may_be_zero=True)

    def _absmax(self, checkpoint: Checkpoint) -> npt.NDArray[np.float32]:
        absmax: npt.NDArray[Any] = checkpoint.read_stored(f"{self.tensor}.absmax")
        if self.state.nested_block is None:
            return absmax
        return nested_absmax(
            absmax,
            checkpoint.read_stored(f"{self.tensor}.nested_absmax"),
            checkpoint.read_stored(f"{self.tensor}.nested_quant_map"),
            self.state.nested_block,
            self.state.nested_offset,
        )

    def open(self, checkpoint: Checkpoint) -> RowReader:
        """See :meth:`PrequantizedTensor.open`."""
        absmax = self._absmax(checkpoint)
        group = self._group()
        scales = np.repeat(absmax, self.state.block // group)[: self.rows * self.inputs // group]
        scales = scales.reshape(self.rows, -1)
        packed = checkpoint.read_stored(self.tensor).reshape(self.rows, -1)
        return lambda start, stop: QuantizedRows(unpack_nibbles(packed[start:stop]), scales[start:stop], None)

    def _group(self) -> int:
        """Return a block size that divides a row too: in a bundle, blocks do not cross rows. Absmax is repeated."""
        return power_of_two_in(self.tensor, math.gcd(self.state.block, self.inputs))


def pack_nibbles(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pack ``[n,K]``, K even, into ``[n,K/2]``, the first in the high nibble."""
    packed: npt.NDArray[np.uint8] = np.left_shift(values[:, ::2], np.uint8(4)) | values[:, 1::2]
    return packed


def unpack_nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Invert :func:`pack_nibbles`."""
    values = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    np.right_shift(packed, 4, out=values[:, ::2])
    np.bitwise_and(packed, 15, out=values[:, 1::2])
    return values


def nested_absmax(
    absmax: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    codes: npt.NDArray[np.float32],
    block: int,
    offset: float,
) -> npt.NDArray[np.float32]:
    """Dequantize a nested absmax to float32, in bitsandbytes' order of operations.

    Args:
        absmax: Quantized absmax ``[blocks]``.
        scales: Scale of every ``block`` of them.
        codes: Codebook ``[256]``.
        block: Values of ``absmax`` per scale.
        offset: Number to add.
    """
    decoded = codes[absmax] * np.repeat(scales, block)[: len(absmax)]
    total: npt.NDArray[np.float32] = decoded + np.float32(offset)
    return total
