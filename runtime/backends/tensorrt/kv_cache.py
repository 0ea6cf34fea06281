"""The KV cache in device memory: in float16, which engines update, or in int8, which they only read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.tensorrt.memory import DeviceMemory, DeviceTensor
from fusion_edge.runtime.bundle.graphs import ADDRESS_ALIGNMENT, TensorSpec, token_alignment

SLOT_STEP = 64
"""Attention of a prefill reads a multiple of so many cache slots: fewer different shapes, each of which has kernels."""
UNUSED = 2**31 - 1
"""Position of a slot that no token has: steps attend to smaller positions."""


class KvCache(Protocol):
    """What the backend needs of a cache."""

    parts: Sequence[DeviceTensor]
    """All of its memory, ``[1,slices,tokens,width]`` each."""
    pointers: Mapping[str, int]
    """Address of each input and output of the engines, by name."""
    step_inputs: tuple[str, ...]
    """Inputs of a decode step that place its token: each is its position."""
    step_sizes: Mapping[str, int]
    """Sizes of the cache's dimensions in a decode step, but for its slots."""

    def start(self, length: int, slots: DeviceTensor, stream: int) -> dict[str, int]:
        """Prepare for a prompt behind ``length`` tokens. Return the addresses that its engines' tensors have then.

        ``slots`` is the engines' input of that name.
        """
        ...

    def prompt_sizes(self, start: int, length: int) -> dict[str, int]:
        """Return the sizes of the cache's dimensions for a prompt of ``length`` tokens behind ``start``."""
        ...

    def prompt_inputs(self, start: int) -> dict[str, npt.NDArray[np.int64]]:
        """Return the inputs that place a prompt behind ``start`` tokens, beside its positions."""
        ...

    def window(self, length: int) -> int:
        """Return the slots that a decode step behind ``length`` tokens needs."""
        ...

    def store(self, length: int, stream: int) -> None:
        """Enqueue what a decode step behind ``length`` tokens leaves to the backend."""
        ...


class InPlaceCache:
    """A cache that engines update: input ``past.{name}`` and output ``present.{name}`` share their memory."""

    step_inputs: tuple[str, ...] = ("positions", "write_index")
    step_sizes: Mapping[str, int] = MappingProxyType({})

    def __init__(self, tensors: Mapping[str, DeviceTensor], max_context: int) -> None:
        """``tensors``: those of the engines, by name; ``past.{name}`` are ``[1,heads,capacity,width]``."""
        past = {name.removeprefix("past."): one for name, one in tensors.items() if name.startswith("past.")}
        self.parts: Sequence[DeviceTensor] = list(past.values())
        self.pointers: Mapping[str, int] = {
            f"{way}.{name}": one.pointer for way in ("past", "present") for name, one in past.items()
        }
        self._max_context = max_context

    def start(self, length: int, slots: DeviceTensor, stream: int) -> dict[str, int]:
        return {}

    def prompt_sizes(self, start: int, length: int) -> dict[str, int]:
        return {"slots": min(-(-(start + length) // SLOT_STEP) * SLOT_STEP, self._max_context)}

    def prompt_inputs(self, start: int) -> dict[str, npt.NDArray[np.int64]]:
        return {"write_index": np.full(1, start, np.int64)}

    def window(self, length: int) -> int:
        return length + 1  # engines write the new row before they read

    def store(self, length: int, stream: int) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """The int8 values (codes) of a cache, or its scales: a slice for keys and one for values of each layer."""

    names: Sequence[str]
    """Of the slices, without ``slots``, ``prefix`` and ``new``."""
    memory: DeviceTensor
    """``[1,slices,slots,width]``."""
    step: int
    """Address of the rows of a decode step, one for each slice."""
    step_pitch: int
    """Bytes between them."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in a slice."""
        return self.memory.shape[3] * self.memory.dtype.itemsize

    @property
    def slice_bytes(self) -> int:
        """Bytes of a slice."""
        return self.memory.shape[2] * self.row_bytes

    def addresses(self, row: int) -> list[int]:
        """Return the address of a row of each slice."""
        return [self.memory.pointer + i * self.slice_bytes + row * self.row_bytes for i in range(len(self.names))]


class QuantizedKvCache:
    """An int8 cache that engines read as ``slots.{name}`` or ``prefix.{name}``. They return the new tokens' rows.

    A prompt writes its rows right behind those that it reads. TensorRT requires an aligned address, so up to
    :func:`fusion_edge.runtime.bundle.graphs.token_alignment` - 1 slots in front of it stay unused. The row of a decode
    step is copied to its slot, outside of the CUDA graph, whose addresses are fixed.
    """

    step_inputs: tuple[str, ...] = ("positions",)
    step_sizes: Mapping[str, int] = MappingProxyType({"prefix": 0})

    def __init__(self, memory: DeviceMemory, specs: Sequence[TensorSpec], slots: int) -> None:
        """Allocate ``slots`` tokens of the tensors ``specs`` (:func:`..bundle.graphs.cache_specs`)."""
        self._cuda = memory.cuda
        self._token_alignment = token_alignment(specs)
        by_type: dict[str, list[TensorSpec]] = {}
        for spec in specs:
            by_type.setdefault(spec.dtype, []).append(spec)
        self._parts = [_part(memory, same, slots) for same in by_type.values()]
        self.parts: Sequence[DeviceTensor] = [part.memory for part in self._parts]
        pointers: dict[str, int] = {}
        for part in self._parts:
            for i, (name, address) in enumerate(zip(part.names, part.addresses(0), strict=True)):
                pointers |= {f"slots.{name}": address, f"prefix.{name}": address}
                pointers[f"new.{name}"] = part.step + i * part.step_pitch
        self.pointers: Mapping[str, int] = pointers
        self._unused = 0
        """Slots that the sequence leaves unused behind its prefix."""

    def start(self, length: int, slots: DeviceTensor, stream: int) -> dict[str, int]:
        first = -(-length // self._token_alignment) * self._token_alignment
        self._unused = first - length
        positions = np.arange(slots.shape[0])
        positions[first:] -= self._unused
        positions[length:first] = UNUSED
        slots.upload(positions, stream)
        return {
            f"new.{name}": address
            for part in self._parts
            for name, address in zip(part.names, part.addresses(first), strict=True)
        }

    def prompt_sizes(self, start: int, length: int) -> dict[str, int]:
        return {"slots": 0, "prefix": start}

    def prompt_inputs(self, start: int) -> dict[str, npt.NDArray[np.int64]]:
        return {}

    def window(self, length: int) -> int:
        return length + self._unused

    def store(self, length: int, stream: int) -> None:
        slot = length + self._unused
        for part in self._parts:
            target, size = part.addresses(slot)[0], part.row_bytes
            self._cuda.copy_rows(target, part.slice_bytes, part.step, part.step_pitch, size, len(part.names), stream)


def _part(memory: DeviceMemory, specs: Sequence[TensorSpec], slots: int) -> Part:
    """Allocate tensors of one type and shape."""
    width = int(np.prod([size for size in specs[0].shape if isinstance(size, int)]))
    tensor = DeviceTensor(memory, specs[0].dtype, (1, len(specs), slots, width), on_host=False)
    pitch = -(-width * tensor.dtype.itemsize // ADDRESS_ALIGNMENT) * ADDRESS_ALIGNMENT
    return Part([spec.name for spec in specs], tensor, memory.device(len(specs) * pitch), pitch)
