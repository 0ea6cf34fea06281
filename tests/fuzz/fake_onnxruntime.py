"""Fake of the part of ONNX Runtime's C interface that the CPU kernels use. It calls one operator on guarded memory.

A loaded library keeps the interface it was registered with. So ONNX Runtime and this fake must not load the same file
in one process.
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

from fusion_edge.kernels.operators import AttributeType, Operator
from fuzz.guarded_memory import GuardedMemory, address

Array = npt.NDArray[Any]
Attribute = int | float | str
DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}
"""numpy type by ONNX element type."""
REQUIRED = 0  # input characteristic
MAX_OUTPUT = 64 << 20  # bytes; larger allocations fail, as on a machine with less memory
API_ENTRIES = 300

_POINTER = POINTER(c_void_p)
_Body = CFUNCTYPE(None, c_void_p, c_size_t)
_FUNCTIONS: dict[int, tuple[Any, ...]] = {
    # index in OrtApi: method, result type, argument types
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
    """``CustomOp`` of ``kernels/cpu/onnxruntime_abi.h``, up to the last function called here."""

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
        ("input_characteristic", CFUNCTYPE(c_int32, c_void_p, c_size_t)),
        ("output_characteristic", CFUNCTYPE(c_int32, c_void_p, c_size_t)),
        ("unused", c_void_p * 5),
        ("create_kernel_v2", CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p, _POINTER)),
        ("compute_v2", CFUNCTYPE(c_void_p, c_void_p, c_void_p)),
    ]  # fmt: skip


class _ApiBase(ctypes.Structure):
    _fields_ = [("get_api", CFUNCTYPE(c_void_p, c_int32)), ("version", c_void_p)]


class KernelError(Exception):
    """Error status of an operator."""


@dataclass
class Call:
    """Arguments of one call. A missing input is None."""

    attributes: Mapping[str, Attribute]
    inputs: Sequence[Array | None]
    memory: GuardedMemory
    at_end: bool = True
    """Whether outputs end at a guard page; otherwise they start at one."""
    threads: int = 1
    empty_is_null: bool = False
    """Whether an empty tensor has a null address."""
    in_place: Mapping[int, int] = field(default_factory=dict)
    """Input whose memory an output shares, by position of the output."""
    outputs: dict[int, Array] = field(default_factory=dict)


class FakeOnnxRuntime:
    """Loads one library. A handle is the number of an object that this class keeps."""

    def __init__(self, library: Path) -> None:
        self._objects: dict[int, Any] = {}
        self._operators: dict[tuple[Any, ...], _CustomOp] = {}
        self._operator = _CustomOp()
        self._call = Call({}, [], GuardedMemory())
        self._api = (c_void_p * API_ENTRIES)()
        self._callbacks: list[object] = []  # keeps them alive
        self._attributes_read: dict[str, AttributeType] = {}
        for entry, (name, result, *arguments) in _FUNCTIONS.items():
            function = CFUNCTYPE(result, *arguments)(getattr(self, f"_{name}"))
            self._callbacks.append(function)
            self._api[entry] = ctypes.cast(function, c_void_p).value
        self._base = _ApiBase(_ApiBase._fields_[0][1](lambda version: ctypes.addressof(self._api)), None)
        self.kernels = ctypes.CDLL(str(library))
        self.kernels.RegisterCustomOps.restype = c_void_p
        self._check(self.kernels.RegisterCustomOps(None, ctypes.byref(self._base)))

    def run(self, operator: Operator, call: Call) -> list[Array]:
        """Run an operator and return its outputs. Raises :class:`KernelError`."""
        op, kernel = self._create(operator, call)
        try:
            self._check(op.compute_v2(kernel, 1))
        finally:
            op.destroy(kernel)
        return [call.outputs[index] for index in range(op.output_count(None))]

    def attributes_read(self, operator: Operator, attributes: Mapping[str, Attribute]) -> dict[str, AttributeType]:
        """Return the attributes, with their types, that an operator reads when it is created."""
        with GuardedMemory() as memory:
            op, kernel = self._create(operator, Call(attributes, [], memory))
        op.destroy(kernel)
        return self._attributes_read

    def signatures(self) -> list[tuple[str, str, list[Any], list[Any], int]]:
        """Return domain, name, input types, output types and number of required inputs of each operator."""
        return [
            (
                domain,
                name,
                [DTYPES[op.input_type(None, i)] for i in range(op.input_count(None))],
                [DTYPES[op.output_type(None, i)] for i in range(op.output_count(None))],
                sum(op.input_characteristic(None, i) == REQUIRED for i in range(op.input_count(None))),
            )
            for (domain, name, _), op in self._operators.items()
        ]

    def _create(self, operator: Operator, call: Call) -> tuple[_CustomOp, c_void_p]:
        outputs = tuple(np.dtype(dtype).type for dtype in operator.outputs.values())
        op = self._operators[operator.domain, operator.name, outputs]
        self._operator, self._call, self._objects, self._attributes_read = op, call, {}, {}
        kernel = c_void_p()
        self._check(op.create_kernel_v2(None, ctypes.addressof(self._api), 1, ctypes.byref(kernel)))
        return op, kernel

    def _check(self, status: int | None) -> None:
        if status:
            raise KernelError(self._objects[status])

    def _add(self, thing: object) -> int:
        self._objects[len(self._objects) + 1] = thing
        return len(self._objects)

    def _create_status(self, code: int, message: bytes) -> int:
        return self._add(message.decode())

    def _create_domain(self, name: bytes, out: Any) -> None:
        out[0] = self._add(name.decode())

    def _add_operator(self, domain: int, operator: int) -> None:
        op = _CustomOp.from_address(operator)
        outputs = tuple(DTYPES[op.output_type(None, i)] for i in range(op.output_count(None)))
        self._operators[self._objects[domain], op.name(None).decode(), outputs] = op

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

    def _attribute(self, name: bytes, kind: AttributeType) -> Any:
        # An operator asks for the right type first. It asks for others to distinguish a wrong type from a missing one.
        self._attributes_read.setdefault(name.decode(), kind)
        value = self._call.attributes.get(name.decode())
        return value if isinstance(value, {"int": int, "float": float, "string": str}[kind]) else None

    def _float_attribute(self, info: int, name: bytes, out: Any) -> int | None:
        return self._give(self._attribute(name, "float"), out)

    def _integer_attribute(self, info: int, name: bytes, out: Any) -> int | None:
        return self._give(self._attribute(name, "int"), out)

    def _text_attribute(self, info: int, name: bytes, out: int | None, size: Any) -> int | None:
        value = self._attribute(name, "string")
        if value is None:
            return self._add("no such attribute")
        text = value.encode() + b"\0"
        if out:
            ctypes.memmove(out, text, len(text))
        size[0] = len(text)
        return None

    def _give(self, value: Any, out: Any) -> int | None:
        if value is None:
            return self._add("no such attribute")
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
                return self._add(f"output {index} has the shape {shape}, not that of its memory")
            call.outputs[index] = shared
        elif int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize > MAX_OUTPUT:
            return self._add(f"out of memory for {shape}")
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
