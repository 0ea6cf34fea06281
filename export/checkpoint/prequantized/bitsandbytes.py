"""bitsandbytes' layout of 4-bit weights, NF4 and FP4.

For a weight ``[N,K]``, cut into blocks of B values row after row:

- ``weight`` uint8 ``[N*K/2, 1]``: two integers a byte, the first in the high nibble;
- ``weight.absmax``: float32 ``[N*K/B]``, the largest absolute value of each block. Or uint8 (nested): an absmax is
  ``nested_quant_map[v] * nested_absmax[block] + nested_offset``, in blocks of their own, ``nested_blocksize`` long;
- ``weight.quant_map`` float32 ``[16]``: what the integers stand for;
- ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``): a JSON object as bytes, with the numbers named above.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.json_fields import Fields
from fusion_edge.export.checkpoint.prequantized.layout import (
    Codes,
    Expected,
    PrequantizedTensor,
    Rows,
    Scales,
    StoredLayout,
    power_of_two_in,
)
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.quant.codebook import CODES
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.errors import FusionError

LARGEST_BLOCK = 4096  # that bitsandbytes writes
LARGEST_STATE = 10_000  # bytes; it writes some hundreds


@dataclass(frozen=True)
class BitsAndBytesLayout:
    """What ``quantization_config`` says."""

    kind: str

    @classmethod
    def read(cls, fields: Fields) -> BitsAndBytesLayout:
        """Raises :class:`FusionError` naming a field that is not supported."""
        fields.one_of("load_in_8bit", (False, None))
        fields.one_of("load_in_4bit", (True,))
        fields.one_of("bnb_4bit_quant_storage", ("uint8", None))
        return cls(fields.one_of("bnb_4bit_quant_type", tuple(CODES)))

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """What stands for the weight ``tensor`` of ``shape`` ``[N,K]``; None if it is not quantized."""
        if tensor not in checkpoint.tensors or checkpoint.tensors[tensor].dtype != "U8":
            return None
        rows, inputs = shape
        name = f"{tensor}.quant_state.bitsandbytes__{self.kind}"
        if name not in checkpoint.tensors:
            raise FusionError(
                f"Tensor {name} is missing from {checkpoint.folder}, which {tensor} is stored with; fetch or save the "
                "checkpoint again."
            )
        return BitsAndBytes(tensor, rows, inputs, self.kind, QuantState.read(checkpoint, name, [rows, inputs]))


@dataclass(frozen=True)
class QuantState:
    """What bitsandbytes stores as JSON."""

    nbytes: int
    """Of the JSON."""
    block: int
    nested_block: int | None
    """None: absmax is not quantized."""
    nested_offset: float

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str, shape: list[int]) -> QuantState:
        """Raises :class:`FusionError` if it is damaged, or is not of a weight of this shape."""

        def damaged(what: str) -> FusionError:
            return FusionError(
                f"Tensor {name} of {checkpoint.folder} is no state of bitsandbytes: {what}. The checkpoint is damaged: "
                "fetch or save it again."
            )

        state: Any = None
        info = checkpoint.tensors[name]
        if info.dtype != "U8" or info.nbytes > LARGEST_STATE:
            raise damaged(f"it does not consist of at most {LARGEST_STATE} bytes")
        try:
            state = json.loads(checkpoint.read_stored(name).tobytes())
        except (ValueError, RecursionError):
            raise damaged("it is no JSON") from None
        if not isinstance(state, dict) or state.get("shape") != shape:
            raise damaged(f"its shape is not {shape}, which config.json asks for")
        sizes = [state.get("blocksize"), state.get("nested_blocksize", 1)]
        for size in sizes:
            if type(size) is not int or not 1 <= size <= LARGEST_BLOCK or size & (size - 1):
                raise damaged(f"a block size is {size!r}, not a power of two up to {LARGEST_BLOCK}")
        offset = state.get("nested_offset", 0.0)
        if type(offset) is not float or not math.isfinite(offset):
            raise damaged(f"nested_offset is {offset!r}, not a number with a point")
        nested = sizes[1] if "nested_blocksize" in state else None
        return cls(math.prod(checkpoint.tensors[name].shape), sizes[0], nested, offset)


@dataclass(frozen=True)
class BitsAndBytes:
    """One weight; see :class:`fusion_edge.export.checkpoint.prequantized.layout.PrequantizedTensor`."""

    tensor: str
    rows: int
    inputs: int
    kind: str
    state: QuantState

    @property
    def tensors(self) -> Mapping[str, Expected]:
        count = self.rows * self.inputs
        blocks = -(-count // self.state.block)
        is_nested = self.state.nested_block is not None
        expected = {
            self.tensor: Expected((-(-count // 2), 1), ("U8",)),
            f"{self.tensor}.absmax": Expected((blocks,), ("U8" if is_nested else "F32",)),
            f"{self.tensor}.quant_map": Expected((16,), ("F32",)),
            f"{self.tensor}.quant_state.bitsandbytes__{self.kind}": Expected((self.state.nbytes,), ("U8",)),
        }
        if self.state.nested_block is not None:
            nested = -(-blocks // self.state.nested_block)
            expected[f"{self.tensor}.nested_absmax"] = Expected((nested,), ("F32",))
            expected[f"{self.tensor}.nested_quant_map"] = Expected((256,), ("F32",))
        return expected

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        found = checkpoint.read_stored(f"{self.tensor}.quant_map")
        if not np.array_equal(found, CODES[self.kind]):
            raise FusionError(
                f"Tensor {self.tensor}.quant_map of {checkpoint.folder} is not that of {self.kind}; the checkpoint is "
                "damaged, or of a release of bitsandbytes that this fusion-edge does not know."
            )
        return StoredLayout(WeightFormat(self.kind, self._group()), "float32", None)

    def scales(self, checkpoint: Checkpoint) -> Scales:
        absmax = self._absmax(checkpoint)
        if self.state.nested_block is not None:
            absmax = np.abs(absmax)  # that of a block of zeros may be rounded to a little below 0
        return Scales(f"{self.tensor}.absmax", absmax, may_be_zero=True)

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

    def open(self, checkpoint: Checkpoint) -> Rows:
        absmax = self._absmax(checkpoint)
        group = self._group()
        scales = np.repeat(absmax, self.state.block // group)[: self.rows * self.inputs // group]
        packed = checkpoint.read_stored(self.tensor).reshape(self.rows, -1)
        return partial(self._read, packed, scales.reshape(self.rows, -1))

    def _read(self, packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], start: int, stop: int) -> Codes:
        return Codes(unpack_nibbles(packed[start:stop]), scales[start:stop], None)

    def _group(self) -> int:
        """Blocks must not cross rows in a bundle: a smaller one, absmax repeated, divides the row as well."""
        return power_of_two_in(self.tensor, math.gcd(self.state.block, self.inputs))


def pack_nibbles(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """``[n,K]``, K even -> ``[n,K/2]``, the first in the high nibble."""
    packed: npt.NDArray[np.uint8] = np.left_shift(values[:, ::2], np.uint8(4)) | values[:, 1::2]
    return packed


def unpack_nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Inverse of :func:`pack_nibbles`."""
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
    """Quantized absmax ``[blocks]`` as float32, in bitsandbytes' own order of operations.

    ``scales``: float32, one for ``block`` of them; ``codes``: float32 ``[256]``.
    """
    decoded = codes[absmax] * np.repeat(scales, block)[: len(absmax)]
    total: npt.NDArray[np.float32] = decoded + np.float32(offset)
    return total
