"""As much of ONNX Runtime's C interface as our CPU kernels use, in Python: it calls one operator on memory of ours.

Of a process that loads it, ONNX Runtime itself must not have loaded the same kernels: they keep the interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fuzz.guarded_memory import GuardedMemory, address

Array = npt.NDArray[Any]
Attribute = int | float | str
DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}
"""By ONNX' numbers of element types."""
LARGEST_OUTPUT = 64 << 20  # bytes; more is not given, as by a machine that has no more
ENTRIES = 300

_POINTER = POINTER(c_void_p)
_Body = CFUNCTYPE(None, c_void_p, c_size_t)
_FUNCTIONS: dict[int, tuple[Any, ...]] = {
    # entry of the table: name of the method, type of the result, types of the arguments
    0: ("create_status", c_void_p, c_int, c_char_p),
    26: ("create_domain", c_void_p, c_char_p, _POINTER),
    27: ("add_operator", c_void_p, c_void_p, c_void_p),
    28: ("add_domain", c_void_p, c_void_p, c_void_p),
    51: ("tensor_data", c_void_p, c_void_p, _POINTER),
    61: ("rank", c_void_p, c_void_p, POINTER(c_size_t)),
    62: ("sizes", c_void_p, c_void_p, POINTER(c_int64), c_size_t),
    65: ("tensor_info", c_void_p, c_void_p, _POINTER),
    85: ("float_attribute", c_void_p, c_void_p, c_char_p, POINTER(c_float)),
    86: ("integer_attribute", c_void_p, c_void_p, c_char_p, POINTER(c_int64)),
    87: ("text_attribute", c_void_p, c_void_p, c_char_p, c_void_p, POINTER(c_size_t)),
    88: ("input_count", c_void_p, c_void_p, POINTER(c_size_t)),
    90: ("input", c_void_p, c_void_p, c_size_t, _POINTER),
    91: ("output", c_void_p, c_void_p, c_size_t, POINTER(c_int64), c_size_t, _POINTER),
    93: ("release_status", None, c_void_p),
    99: ("release_info", None, c_void_p),
    274: ("parallel_for", c_void_p, c_void_p, _Body, c_size_t, c_size_t, c_void_p),
}


class _CustomOp(ctypes.Structure):
    """``CustomOp`` of ``kernels/cpu/onnxruntime_abi.h`` up to what is called here."""

    _fields_ = [
        ("version", c_int32),
        ("create_kernel", c_void_p),
        ("name", CFUNCTYPE(c_char_p, c_void_p)),
        ("execution_provider", c_void_p),
        ("input_type", CFUNCTYPE(c_int32, c_void_p, c_size_t)),
        ("input_count", CFUNCTYPE(c_size_t, c_void_p)),
        ("output_type", CFUNCTYPE(c_int32, c_void_p, c_size_t)),
        ("output_count", CFUNCTYPE(c_size_t, c_void_p)),
        ("compute", c_void_p),
        ("destroy", CFUNCTYPE(None, c_void_p)),
        ("unused", c_void_p * 7),
        ("create_kernel_v2", CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p, _POINTER)),
        ("compute_v2", CFUNCTYPE(c_void_p, c_void_p, c_void_p)),
    ]  # fmt: skip


class _ApiBase(ctypes.Structure):
    _fields_ = [("get_api", CFUNCTYPE(c_void_p, c_int32)), ("version", c_void_p)]


class Refused(Exception):
    """What an operator says."""


@dataclass
class Call:
    """One operator on some inputs, of which those left out are None."""

    attributes: Mapping[str, Attribute]
    inputs: Sequence[Array | None]
    memory: GuardedMemory
    at_end: bool = True
    """Where outputs lie in their memory."""
    threads: int = 1
    empty_is_null: bool = False
    """Whether a tensor of no value has no address."""
    in_place: Mapping[int, int] = field(default_factory=dict)
    """Outputs that lie in the memory of an input."""
    outputs: dict[int, Array] = field(default_factory=dict)


class FakeOnnxRuntime:
    """Holds one library. Handles that it gives out are numbers of its own objects."""

    def __init__(self, library: Path) -> None:
        self._objects: dict[int, Any] = {}
        self._operators: dict[tuple[str, ...], _CustomOp] = {}
        self._operator = _CustomOp()
        self._call = Call({}, [], GuardedMemory())
        self._api = (c_void_p * ENTRIES)()
        self._kept: list[object] = []
        for entry, (name, result, *arguments) in _FUNCTIONS.items():
            function = CFUNCTYPE(result, *arguments)(getattr(self, f"_{name}"))
            self._kept.append(function)
            self._api[entry] = ctypes.cast(function, c_void_p).value
        self._base = _ApiBase(_ApiBase._fields_[0][1](lambda version: ctypes.addressof(self._api)), None)
        self.kernels = ctypes.CDLL(str(library))
        self.kernels.RegisterCustomOps.restype = c_void_p
        self._check(self.kernels.RegisterCustomOps(None, ctypes.byref(self._base)))

    def run(self, domain: str, name: str, cache: str, call: Call) -> list[Array]:
        """Outputs of the operator ``name`` whose cache has the element type ``cache``, if it has one, else \"\".

        :raises Refused: the status that it returns
        """
        operator = self._operators[domain, name, cache]
        self._operator, self._call, self._objects = operator, call, {}
        kernel = c_void_p()
        self._check(operator.create_kernel_v2(None, ctypes.addressof(self._api), 1, ctypes.byref(kernel)))
        try:
            self._check(operator.compute_v2(kernel, 1))
        finally:
            operator.destroy(kernel)
        return [call.outputs[index] for index in range(operator.output_count(None))]

    def input_dtypes(self, domain: str, name: str, cache: str) -> list[Any]:
        operator = self._operators[domain, name, cache]
        return [DTYPES[operator.input_type(None, i)] for i in range(operator.input_count(None))]

    def _check(self, status: int | None) -> None:
        if status:
            raise Refused(self._objects[status])

    def _add(self, thing: object) -> int:
        self._objects[len(self._objects) + 1] = thing
        return len(self._objects)

    def _create_status(self, code: int, message: bytes) -> int:
        return self._add(message.decode())

    def _create_domain(self, name: bytes, out: Any) -> None:
        out[0] = self._add(name.decode())

    def _add_operator(self, domain: int, operator: int) -> None:
        op = _CustomOp.from_address(operator)
        types = {DTYPES[op.output_type(None, i)] for i in range(op.output_count(None))}
        name = op.name(None).decode()
        cache = ("int8" if np.int8 in types else "float32") if name == "GroupQueryAttention" else ""
        self._operators[self._objects[domain], name, cache] = op

    def _add_domain(self, options: int | None, domain: int) -> None:
        pass

    def _tensor_data(self, value: int, out: Any) -> None:
        array = self._objects[value]
        out[0] = None if self._call.empty_is_null and not array.size else address(array)

    def _rank(self, info: int, out: Any) -> None:
        out[0] = self._objects[info].ndim

    def _sizes(self, info: int, out: Any, count: int) -> None:
        for axis, size in enumerate(self._objects[info].shape):
            out[axis] = size

    def _tensor_info(self, value: int, out: Any) -> None:
        out[0] = value

    def _attribute(self, name: bytes, kind: type) -> Any:
        value = self._call.attributes.get(name.decode())
        return value if isinstance(value, kind) else None

    def _float_attribute(self, info: int, name: bytes, out: Any) -> int | None:
        return self._give(self._attribute(name, float), out)

    def _integer_attribute(self, info: int, name: bytes, out: Any) -> int | None:
        return self._give(self._attribute(name, int), out)

    def _text_attribute(self, info: int, name: bytes, out: int | None, size: Any) -> int | None:
        value = self._attribute(name, str)
        if value is None:
            return self._add("there is no such attribute")
        text = value.encode() + b"\0"
        if out:
            ctypes.memmove(out, text, len(text))
        size[0] = len(text)
        return None

    def _give(self, value: Any, out: Any) -> int | None:
        if value is None:
            return self._add("there is no such attribute")
        out[0] = value
        return None

    def _input_count(self, context: int, out: Any) -> None:
        out[0] = len(self._call.inputs)

    def _input(self, context: int, index: int, out: Any) -> None:
        array = self._call.inputs[index]
        out[0] = None if array is None else self._add(array)

    def _output(self, context: int, index: int, sizes: Any, rank: int, out: Any) -> int | None:
        call, shape = self._call, tuple(sizes[:rank])
        dtype = DTYPES[self._operator.output_type(None, index)]
        if index in call.in_place:
            shared = call.inputs[call.in_place[index]]
            if shared is None or shared.shape != shape:
                return self._add(f"output {index} has the shape {shape}, and memory is given for another")
            call.outputs[index] = shared
        elif int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize > LARGEST_OUTPUT:
            return self._add(f"there is no memory for {shape}")
        else:
            call.outputs[index] = call.memory.array(shape, dtype, call.at_end)
            call.outputs[index].reshape(-1).view(np.uint8)[...] = 0xA5
        out[0] = self._add(call.outputs[index])
        return None

    def _release_status(self, status: int) -> None:
        pass

    def _release_info(self, info: int) -> None:
        pass

    def _parallel_for(self, context: int, body: Callable[..., None], total: int, batches: int, data: int) -> None:
        if self._call.threads == 1:
            for index in range(total):
                body(data, index)
            return
        with ThreadPoolExecutor(self._call.threads) as pool:
            list(pool.map(lambda index: body(data, index), range(total)))
