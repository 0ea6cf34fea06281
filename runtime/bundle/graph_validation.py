"""An allowlist for ONNX files: only what fusion-export writes reaches ONNX Runtime or TensorRT.

A graph can name any file as its weights, and hold operators or settings that load libraries or run code. So every
field, operator and weight location is checked before a runtime sees the file, and anything unknown is refused. Field
numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from fusion_edge.runtime.bundle.protobuf import fields

PAGE = 4096
"""Alignment of weights in data files, so that runtimes can map them into memory."""
LARGEST_FILE = 1 << 20
"""Limit in bytes, over twice the largest graph of an 8B model (TensorRT, calibrated vision: 0.38 MB)."""
DEEPEST = 4
"""Limit of nested branches."""
FUNCTIONS = "fusion_edge"
"""Domain of the functions that a graph defines."""

OPERATORS: Mapping[str, frozenset[str]] = {
    domain: frozenset(names.split())
    for domain, names in {
        "": """
            Abs Add Attention Cast CastLike Concat Constant DequantizeLinear Div Expand Gather Gelu Greater Identity If
            LayerNormalization Less LessOrEqual MatMul Max Min Mul Pad QuantizeLinear RMSNormalization Range ReduceMax
            ReduceMean ReduceSum Reshape RotaryEmbedding Round ScatterND Shape Sigmoid SimplifiedLayerNormalization Size
            Slice Softmax Split Sqrt Squeeze Sub TensorScatter Transpose Unsqueeze Where
        """,
        "com.microsoft": """
            FastGelu FusedMatMul GroupQueryAttention MatMulBnb4 MatMulNBits MultiHeadAttention QuickGelu
            SkipSimplifiedLayerNormalization
        """,
        FUNCTIONS: """
            AddLayerNorm AddRows CachedAttention ContextAttention DequantizeNvfp4 GeluIntegerProduct GeluMatMulNBits
            IntegerMlp IntegerProduct MaskedAttention MatMulNBits PackedAttention PatchAttention QuantizeNvfp4 SwiGlu
        """,
    }.items()
}
"""By domain, the operators that the lowerings write. They only compute."""

BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 9: 8, 10: 16, 17: 8, 21: 4, 22: 4}
"""Bits per value by ``TensorProto``'s number: float, uint8, int8, int32, int64, bool, float16, FLOAT8E4M3FN, uint4,
int4."""

_MODEL = {1: "ir_version", 2: "producer_name", 3: "producer_version", 7: "graph", 8: "opset_import", 25: "functions"}
_OPSET = {1: "domain", 2: "version"}
_FUNCTION = {1: "name", 4: "input", 5: "output", 6: "parameter", 7: "node", 9: "opset_import", 10: "domain"}
_GRAPH = {1: "node", 2: "name", 5: "initializer", 11: "value_info", 12: "value_info", 13: "value_info"}
_NODE = {1: "input", 2: "output", 3: "name", 4: "op_type", 5: "attribute", 7: "domain"}
_ATTRIBUTE = {1: "name", 2: "f", 3: "i", 4: "s", 5: "t", 6: "g", 7: "floats", 8: "ints", 20: "type", 21: "reference"}
_TENSOR = {1: "dims", 2: "data_type", 8: "name", 9: "raw_data", 13: "external_data", 14: "data_location"}
_ENTRY = {1: "key", 2: "value"}
_VALUE_INFO = {1: "name", 2: "type"}
_TYPE = {1: "tensor_type"}
_TENSOR_TYPE = {1: "data_type", 2: "shape"}
_SHAPE = {1: "dimension"}
_DIMENSION = {1: "length", 2: "symbol"}
_NAMES = {"name", "domain", "op_type", "input", "output", "parameter", "reference"}
_TEXTS = frozenset(_NAMES | {"producer_name", "producer_version", "key", "value", "symbol"})
"""Fields of type ``string``, which are UTF-8; ONNX Runtime's Python module raises for others when it returns them."""
_STORED, _EXTERNAL = 0, 1  # data_location


def check_graph(path: Path, data_file: str, data_size: int) -> None:
    """Raise ``ValueError``, a part of a sentence, for a graph that fusion-export does not write, or :class:`OSError`.

    All weights must lie in ``data_file`` of ``data_size`` bytes, in the same folder.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes")
    _Check(data_file, data_size).model(path.read_bytes())


class _Check:
    """Checks one message type per method, named after it; each raises ``ValueError``."""

    def __init__(self, data_file: str, data_size: int) -> None:
        self._data_file = data_file
        self._data_size = data_size
        self._functions: set[str] = set()

    def model(self, message: bytes) -> None:
        for name, value in _parts(message, "model", _MODEL):
            if name == "graph":
                self._graph(_bytes(value), 0)
            elif name == "functions":
                self._function(_bytes(value))
            elif name == "opset_import":
                domain = _text(_single(_bytes(value), "opset_import", _OPSET).get("domain", b""))
                if domain not in OPERATORS:
                    raise ValueError(f"it has operators of the domain {domain!r}")

    def _function(self, message: bytes) -> None:
        """Refuse functions that call functions: a few could inline to billions of nodes."""
        names = {"domain": "", "name": ""}
        for name, value in _parts(message, "function", _FUNCTION):
            if name == "node":
                self._node(_bytes(value), 0, is_in_function=True)
            elif name in names:
                names[name] = _text(value)
        function = names["name"]
        if names["domain"] != FUNCTIONS or function not in OPERATORS[FUNCTIONS] or function in self._functions:
            raise ValueError(f"it defines the function {names['domain']}::{function}"[:80])
        self._functions.add(function)

    def _graph(self, message: bytes, depth: int, is_in_function: bool = False) -> None:
        if depth > DEEPEST:
            raise ValueError("it has too deeply nested branches")
        for name, value in _parts(message, "graph", _GRAPH):
            if name == "node":
                self._node(_bytes(value), depth, is_in_function)
            elif name == "initializer":
                self._tensor(_bytes(value), may_be_external=depth == 0)
            elif name == "value_info":
                self._value_info(_bytes(value))

    def _value_info(self, message: bytes) -> None:
        """Check the names of a tensor and its dimensions."""
        messages = [message]
        for kind, known, inner in (
            ("value_info", _VALUE_INFO, "type"),
            ("type", _TYPE, "tensor_type"),
            ("tensor_type", _TENSOR_TYPE, "shape"),
            ("shape", _SHAPE, "dimension"),
            ("dimension", _DIMENSION, ""),
        ):
            parts = [part for each in messages for part in _parts(each, kind, known)]
            messages = [_bytes(value) for name, value in parts if name == inner]

    def _node(self, message: bytes, depth: int, is_in_function: bool) -> None:
        names = {"domain": "", "op_type": ""}
        for name, value in _parts(message, "node", _NODE):
            if name == "attribute":
                self._attribute(_bytes(value), depth, is_in_function)
            elif name in names:
                if names[name]:
                    raise ValueError(f"it has a node with two values of {name}")
                names[name] = _text(value)
        domain, operator = names["domain"], names["op_type"]
        if operator not in OPERATORS.get(domain, ()) or (is_in_function and domain == FUNCTIONS):
            raise ValueError(f"it has the operator {domain and domain + '::'}{operator}"[:80])

    def _attribute(self, message: bytes, depth: int, is_in_function: bool) -> None:
        for name, value in _parts(message, "attribute", _ATTRIBUTE):
            if name == "g":
                self._graph(_bytes(value), depth + 1, is_in_function)
            elif name == "t":
                self._tensor(_bytes(value), may_be_external=False)

    def _tensor(self, message: bytes, may_be_external: bool) -> None:
        entries: dict[str, str] = {}
        shape: list[int] = []
        kind, location = 0, _STORED
        for name, value in _parts(message, "tensor", _TENSOR):
            if name == "external_data":
                entry = _single(_bytes(value), "external_data", _ENTRY)
                key = _text(entry.get("key", b""))
                if key in entries:
                    raise ValueError(f"it has a tensor with two values of {key}")
                entries[key] = _text(entry.get("value", b""))
            elif name == "dims":
                shape.append(_integer(value))
            elif name == "data_type":
                kind = _integer(value)
            elif name == "data_location":
                location = _integer(value)
        if location not in (_STORED, _EXTERNAL) or (location == _EXTERNAL) != bool(entries):
            raise ValueError("it has a tensor without a location of its values")
        if entries:
            if not may_be_external:
                raise ValueError("it has a constant with values in another file")
            self._external(entries, shape, kind)

    def _external(self, entries: Mapping[str, str], shape: list[int], kind: int) -> None:
        if entries.keys() != {"location", "offset", "length"}:
            raise ValueError(f"it gives the location of a weight by {', '.join(sorted(entries))}"[:80])
        if entries["location"] != self._data_file:
            raise ValueError(f"its weights are in {entries['location'][:60]!r}, not in {self._data_file}")
        offset, length = (_decimal(entries[key]) for key in ("offset", "length"))
        if kind not in BITS or length != -(-math.prod(shape) * BITS[kind] // 8):
            raise ValueError(f"it has a weight of type {kind} and shape {shape[:8]} in {length} bytes")
        if offset % PAGE or offset + length > self._data_size:
            raise ValueError(f"it has a weight at bytes {offset} to {offset + length} of {self._data_size}")


def _parts(message: bytes, kind: str, known: Mapping[int, str]) -> list[tuple[str, int | bytes]]:
    """Return names and values of a message's fields. Raise for an unknown field, or a text that is not UTF-8."""
    try:
        found = [(known[number], value) for number, value in fields(message)]
    except KeyError as error:
        raise ValueError(f"it has field {error} in its message {kind}") from None
    for name, value in found:
        if name in _TEXTS:
            _text(value)
    return found


def _single(message: bytes, kind: str, known: Mapping[int, str]) -> dict[str, int | bytes]:
    """Return the fields of a message. Raise for a repeated field."""
    found: dict[str, int | bytes] = {}
    for name, value in _parts(message, kind, known):
        if name in found:
            raise ValueError(f"it has a {kind} with two values of {name}")
        found[name] = value
    return found


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("it has a number in place of bytes")
    return value


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("it has bytes in place of a number")
    return value


def _text(value: int | bytes) -> str:
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it has a text that is not UTF-8: {_bytes(value)[:40]!r}") from error


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"it gives the location of a weight as {text[:40]!r}, not a number of bytes")
    return int(text)
