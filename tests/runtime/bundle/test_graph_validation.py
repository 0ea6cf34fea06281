"""Graphs with anything that fusion-export does not write are refused before a runtime sees them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from fusion_edge.export import cli
from fusion_edge.runtime import FusionError
from fusion_edge.runtime.bundle.graph_validation import LARGEST_FILE, PAGE, check_graph
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.protobuf import fields
from fusion_edge.runtime.bundle.reader import open_bundle

Change = Callable[[ModelProto], object]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def rewrite(folder: Path, change: Change) -> None:
    """Change the LLM's graph and its checksum."""
    path = folder / "llm.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    put(folder, model.SerializeToString())


def put(folder: Path, content: bytes) -> None:
    (folder / "llm.onnx").write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    entry = next(entry for entry in manifest["files"] if entry["path"] == "llm.onnx")
    entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def weight(model: ModelProto) -> TensorProto:
    found: TensorProto = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    return found


def place(key: str, value: str) -> Change:
    def change(model: ModelProto) -> None:
        next(entry for entry in weight(model).external_data if entry.key == key).value = value

    return change


def node(operator: str, domain: str = "", **attributes: Any) -> Change:
    return lambda model: model.graph.node.append(
        helper.make_node(operator, ["embeddings"], ["y"], domain=domain, **attributes)
    )


def external(name: str = "constant") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "llm.data"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def branch(*nodes: NodeProto, initializer: TensorProto | None = None) -> GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [], [] if initializer is None else [initializer])


def nested(depth: int) -> GraphProto:
    graph = branch()
    for _ in range(depth):
        graph = branch(helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=branch()))
    return graph


def call_in_function(model: ModelProto) -> None:
    model.functions[0].node.append(helper.make_node("SwiGlu", ["x"], ["y"], domain="fusion_edge"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (place("location", "../outside.data"), "its weights are in '../outside.data', not in llm.data"),
        (place("location", "/etc/passwd"), "its weights are in '/etc/passwd'"),
        (place("location", "./llm.data"), "its weights are in './llm.data'"),
        (place("location", "embeddings.data"), "its weights are in 'embeddings.data'"),  # listed, but of another graph
        (place("location", "unlisted.data"), "its weights are in 'unlisted.data'"),
        (place("location", "*/_ORT_MEM_ADDR_/*"), "its weights are in '*/_ORT_MEM_ADDR_/*'"),
        (place("location", ""), "its weights are in ''"),
        (place("offset", str(1 << 40)), "it has a weight at bytes 1099511627776"),
        (place("offset", "1"), "it has a weight at bytes 1 to"),
        (place("offset", "-4096"), "'-4096', not a number of bytes"),
        (place("offset", "0x1000"), "'0x1000', not a number of bytes"),
        (place("offset", "9" * 30), "not a number of bytes"),
        (place("length", "5"), "in 5 bytes"),
        (lambda m: weight(m).external_data.add(key="location", value="/etc/passwd"), "two values of location"),
        (lambda m: weight(m).external_data.add(key="checksum", value="0"), "location of a weight by checksum, length"),
        (lambda m: weight(m).external_data.pop(), "location of a weight by location, offset"),
        (lambda m: weight(m).ClearField("external_data"), "a tensor without a location of its values"),
        (lambda m: weight(m).ClearField("data_location"), "a tensor without a location of its values"),
        (lambda m: weight(m).dims.append(7), "in "),
        (lambda m: m.graph.sparse_initializer.add(values=external()), "field 15 in its message graph"),
        (node("Constant", value=external()), "a constant with values in another file"),
        (node("Constant", sparse_value=onnx.SparseTensorProto(values=external())), "field 22 in its message attribute"),
        (node("If", then_branch=branch(initializer=external())), "a constant with values in another file"),
        (lambda m: m.functions[0].node.append(helper.make_node("Constant", [], ["c"], value=external())), "a constant"),
        (node("Loop", body=branch()), "it has the operator Loop"),
        (node("If", then_branch=branch(helper.make_node("Loop", [], []))), "it has the operator Loop"),
        (node("PyOp", "com.microsoft.extensions"), "it has the operator com.microsoft.extensions::PyOp"),
        (node("EPContext", "com.microsoft", ep_cache_context="../engine.bin"), "com.microsoft::EPContext"),
        (node("Add", "com.example"), "it has the operator com.example::Add"),
        (node("ImageDecoder"), "it has the operator ImageDecoder"),
        (node("AdamOptimizer", "com.microsoft"), "com.microsoft::AdamOptimizer"),
        (node("If", then_branch=nested(20)), "deeply nested branches"),
        (call_in_function, "it has the operator fusion_edge::SwiGlu"),
        (lambda m: m.functions.append(m.functions[0]), "it defines the function fusion_edge::"),
        (lambda m: m.functions.add(domain="", name="Add"), "it defines the function ::Add"),
        (lambda m: m.functions.add(domain="fusion_edge", name="Mine"), "it defines the function fusion_edge::Mine"),
        (lambda m: m.metadata_props.add(key="ort_config", value="{}"), "field 14 in its message model"),
        (lambda m: m.training_info.add(), "field 20 in its message model"),
        (lambda m: m.opset_import.add(domain="ai.onnx.ml", version=1), "operators of the domain 'ai.onnx.ml'"),
        (lambda m: m.graph.quantization_annotation.add(), "field 14 in its message graph"),
    ],
)
def test_graphs_outside_the_allowlist_are_refused(copy: Path, change: Change, reason: str) -> None:
    (copy / "unlisted.data").write_bytes((copy / "llm.data").read_bytes())
    rewrite(copy, change)
    with pytest.raises(FusionError) as refusal:
        open_bundle(copy)
    assert f"{copy / 'llm.onnx'} is not a graph that fusion-export wrote: " in str(refusal.value)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    "content", [b"\x00", b"\x3a\x05ab", b"\x0b", b"\x38\x01", b"\xff" * 11, b"\x3a" + b"\xff" * 9 + b"\x01", b"<html>"]
)
def test_files_that_are_not_graphs(copy: Path, content: bytes) -> None:
    put(copy, content)
    with pytest.raises(FusionError, match="is not a graph that fusion-export wrote"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "text",
    [b"embeddings", b"logits", b"MatMulNBits", b"com.microsoft", b"capacity", b"epsilon", b"llm.data", b"offset"],
)
def test_texts_that_are_not_utf8_are_refused(copy: Path, text: bytes) -> None:
    """Names of tensors, operators, domains, dimensions, attributes and files."""
    content = (copy / "llm.onnx").read_bytes()
    assert text in content
    put(copy, content.replace(text, b"\xff" + text[1:]))
    with pytest.raises(FusionError, match=r"is not a graph that fusion-export wrote: it has a text that is not UTF-8"):
        open_bundle(copy)


def test_large_graphs_are_refused(copy: Path) -> None:
    put(copy, bytes(LARGEST_FILE + 1))
    with pytest.raises(FusionError, match=f"it has more than {LARGEST_FILE} bytes"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "options",
    [
        "--int4 --asym",
        "--int8",
        "--fp16",
        "--fp32 --kv-cache int8",
        "--nf4 --group-size 32",
        "--int4 --target cuda",
        "--fp16 --target tensorrt",
        "--fp16 --target tensorrt --kv-cache int8",
        "--int4 --group-size 64 --target tensorrt --rule *=int8:channel",
    ],
)
def test_every_kind_of_bundle_opens(tiny_checkpoint: Path, tmp_path: Path, options: str) -> None:
    """The allowlist has exactly the operators that the lowerings write."""
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), *options.split()]) == 0
    for name in open_bundle(tmp_path / "b").manifest.graphs:
        data = tmp_path / "b" / f"{name}.data"
        check_graph(tmp_path / "b" / f"{name}.onnx", data.name, data.stat().st_size)
        model = onnx.load(tmp_path / "b" / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            offset = next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)
            assert offset % PAGE == 0


# The wire format --------------------------------------------------------------------------------------------


@given(st.binary(max_size=60))
def test_arbitrary_bytes_parse_or_raise_value_error(message: bytes) -> None:
    try:
        found = list(fields(message))
    except ValueError:
        return
    assert sum(len(value) for _, value in found if isinstance(value, bytes)) <= len(message)


@given(st.integers(0, 2**64 - 1), st.text(max_size=300), st.floats(width=32, allow_nan=False))
def test_fields_equal_those_of_protobuf(number: int, text: str, real: float) -> None:
    signed = number - (1 << 64) if number >> 63 else number
    attribute = onnx.AttributeProto(name=text, i=signed, f=real)
    found = dict(fields(attribute.SerializeToString()))
    assert found[1] == text.encode()
    assert found[3] == number
    assert len(bytes(found[2])) == 4


def test_every_truncation_is_detected(tiny_bundle: Path) -> None:
    """Truncation between two fields gives a valid shorter message."""
    content = (tiny_bundle / "alignment_decoder.onnx").read_bytes()
    whole = len(list(fields(content)))
    for length in range(0, len(content), 97):
        try:
            assert len(list(fields(content[:length]))) <= whole
        except ValueError as error:
            assert str(error) in ("truncated", "a number above 64 bits")  # noqa: PT017
