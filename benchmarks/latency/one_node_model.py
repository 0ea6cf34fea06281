"""ONNX models of one node, written without the package ``onnx``: robots have ONNX Runtime alone.

Field numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

ELEMENT_TYPES = {np.dtype(t): number for t, number in [("f4", 1), ("u1", 2), ("i1", 3), ("i4", 6), ("f2", 10)]}
INT = 2
"""``AttributeProto.INT``."""
IR_VERSION = 10
OPSETS = {"": 21, "com.microsoft": 1}


def one_node_model(
    operator: str,
    inputs: Mapping[str, type[np.generic]],
    output: type[np.generic],
    weights: Mapping[str, npt.NDArray[Any]],
    domain: str = "",
    attributes: Mapping[str, int] | None = None,
) -> bytes:
    """Return a serialized model that computes matrix ``y`` from matrices ``inputs`` and then ``weights``."""
    node = b"".join(_field(1, name) for name in (*inputs, *weights)) + _field(2, "y") + _field(4, operator)
    for name, value in (attributes or {}).items():
        node += _field(5, _field(1, name) + _field(3, value) + _field(20, INT))
    node += _field(7, domain)
    graph = _field(1, node) + _field(2, operator)
    for name, values in weights.items():
        shape = b"".join(_field(1, size) for size in values.shape)
        graph += _field(
            5, shape + _field(2, ELEMENT_TYPES[values.dtype]) + _field(8, name) + _field(9, values.tobytes())
        )
    for number, name, dtype in (*((11, name, dtype) for name, dtype in inputs.items()), (12, "y", output)):
        any_matrix = _field(2, _field(1, b"") * 2)
        graph += _field(
            number, _field(1, name) + _field(2, _field(1, _field(1, ELEMENT_TYPES[np.dtype(dtype)]) + any_matrix))
        )
    opsets = b"".join(_field(8, _field(1, name) + _field(2, version)) for name, version in OPSETS.items())
    return _field(1, IR_VERSION) + _field(7, graph) + opsets


def _field(number: int, value: int | str | bytes) -> bytes:
    """Return a field of a protobuf message: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
