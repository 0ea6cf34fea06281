"""Mutate ONNX graphs: nodes, attributes, initializers and their data locations, shapes, types, or bytes."""

from __future__ import annotations

from random import Random
from typing import Any

import onnx

from fuzz.mutations import mutate_bytes
from fuzz.tokenizer_mutants import split_message

OPERATORS = (
    "Add", "Cast", "Concat", "Expand", "Gather", "If", "Identity", "Loop", "MatMul", "MatMulNBits",
    "GroupQueryAttention",
    "MultiHeadAttention", "NonZero", "Pad", "Range", "Reshape", "Resize", "Scan", "ScatterND", "Slice", "Tile",
    "Unknown", "",
    "SkipLayerNormalization", "DequantizeLinear", "MatMulBnb4", "RotaryEmbedding",
)  # fmt: skip
INTEGERS = (0, 1, -1, 2, 3, 7, 16, 17, 64, 128, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
LOCATIONS = (
    "../secret", "/etc/hostname", "/dev/zero", "/proc/self/mem", "", ".", "llm.data", "bundle.json", "missing", "x" *
    300,
    "*/_ORT_MEM_ADDR_/*", "sub/../llm.data", "\\\\server\\x", "file:///etc/hostname",
)  # fmt: skip


def mutate_graph(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Return an ``.onnx`` file with one change, and a description."""
    what = draw.randrange(20)
    if what == 0:
        return mutate_bytes(draw, content)
    if what == 1 and (fields := split_message(content)):
        index = draw.randrange(len(fields))
        fields[index], change = mutate_bytes(draw, fields[index])
        return b"".join(fields), f"field {index}: {change}"
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # an earlier change broke it; the library does not document the type
        raise ValueError("no graph") from error
    graph = model.graph
    nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
    nodes += [inner for node in nodes for a in node.attribute if a.HasField("g") for inner in a.g.node]
    if what <= 6:
        change = _initializer(draw, graph)
    elif what <= 10:
        change = _attribute(draw, nodes)
    elif what <= 15:
        change = _node(draw, graph, nodes)
    elif what <= 17:
        change = _value_info(draw, draw.choice([*graph.input, *graph.output]))
    else:
        change = _model(draw, model)
    return model.SerializeToString(), change


def _initializer(draw: Random, graph: Any) -> str:
    """Change an initializer's location in the data file, type or shape."""
    tensor = draw.choice(list(graph.initializer))
    places = {entry.key: entry for entry in tensor.external_data}
    what = draw.randrange(10)
    if what <= 5 and places:
        key = draw.choice(sorted(places))
        numbers = [*INTEGERS, 1, 2, 3, 4095, "x", "", "1e9", "0x10", " 1", 10**30]
        old = places[key].value
        numbers += [int(old) + 1, int(old) // 2, int(old) * 2] if old.isdecimal() else []
        places[key].value = str(draw.choice(LOCATIONS if key == "location" else numbers))
        return f"{tensor.name} {key} = {places[key].value[:40]}"
    if what == 6:
        tensor.data_type = draw.randrange(-1, 26)
        return f"{tensor.name} of type {tensor.data_type}"
    if what == 7:
        if places and draw.random() < 0.5:
            del tensor.external_data[:]
            tensor.data_location = draw.choice([0, 1])
            return f"{tensor.name} without its place"
        tensor.raw_data = draw.randbytes(draw.choice([0, 1, 8]))
        tensor.data_location = 0
        return f"{tensor.name} with {len(tensor.raw_data)} inline bytes"
    if what == 8:
        tensor.name = draw.choice([draw.choice(list(graph.initializer)).name, "", "x"])
        return f"an initializer named {tensor.name}"
    dims = list(tensor.dims)
    changed = draw.choice([dims[::-1], [], [*dims, 1], dims[:-1], [0], [-1], [2**40, 2**40], [d + 1 for d in dims]])
    tensor.dims[:] = changed
    return f"{tensor.name} of shape {changed}"


def _attribute(draw: Random, nodes: list[Any]) -> str:
    places = [(node, attribute) for node in nodes for attribute in node.attribute]
    if not places:
        return "nothing"
    node, attribute = draw.choice(places)
    what = draw.randrange(6)
    if what == 0:
        node.attribute.remove(attribute)
        return f"{node.op_type} without {attribute.name}"
    if attribute.HasField("i") and what <= 4:
        attribute.i = draw.choice([*INTEGERS, max(attribute.i - 1, 0), min(attribute.i, 2**60) * 2])
    elif attribute.HasField("f") and what <= 4:
        attribute.f = draw.choice([0.0, -1.0, 1e38, float("nan"), float("inf"), 1e-45])
    elif attribute.ints and what <= 4:
        attribute.ints[:] = draw.choice([[], [draw.choice(INTEGERS)], [*attribute.ints, 0], list(attribute.ints)[::-1]])
    elif what == 5:
        attribute.type = draw.randrange(15)
    else:
        attribute.name = draw.choice(["axis", "axes", "N", "K", "bits", "block_size", "num_heads", "to", "x"])
    return f"{node.op_type} {node.name}: {attribute.name} = {str(onnx.helper.printable_attribute(attribute))[:60]}"


def _node(draw: Random, graph: Any, nodes: list[Any]) -> str:
    """Change a node's operator, inputs or outputs."""
    node = draw.choice(nodes)
    names = [name for other in nodes for name in (*other.input, *other.output)]
    what = draw.randrange(9)
    if what <= 1:
        node.op_type = draw.choice([*OPERATORS, draw.choice(nodes).op_type])
        return f"{node.name} is {node.op_type}"
    if what == 2:
        node.domain = draw.choice(["", "com.microsoft", "fusion_edge", "ai.onnx.ml", "x"])
        return f"{node.name} {node.op_type} of domain {node.domain!r}"
    if what <= 4 and node.input:
        index = draw.randrange(len(node.input))
        node.input[index] = draw.choice([*names, "", "missing"])
        return f"{node.name} {node.op_type} reads {node.input[index]}"
    if what == 5 and node.output:
        node.output[0] = draw.choice([*names, "", "other"])
        return f"{node.name} {node.op_type} writes {node.output[0]}"
    if what == 6 and node.input:
        del node.input[draw.randrange(len(node.input))]
        return f"{node.name} {node.op_type} with an input less"
    if what == 7:
        node.input.append(draw.choice(names))
        return f"{node.name} {node.op_type} with an input more"
    index = draw.randrange(len(graph.node))
    name = graph.node[index].name
    if draw.random() < 0.5:
        del graph.node[index]
        return f"{name} removed"
    graph.node.append(graph.node[index])
    return f"{name} twice"


def _value_info(draw: Random, info: Any) -> str:
    """Change the name, type or shape of an input or output."""
    tensor = info.type.tensor_type
    what = draw.randrange(5)
    if what == 0:
        info.name = draw.choice(["x", "", "logits", "embeddings"])
    elif what == 1:
        tensor.elem_type = draw.choice([0, 1, 2, 3, 7, 8, 9, 10, 11, 16])
    elif what == 2 and tensor.shape.dim:
        del tensor.shape.dim[0]
    elif what == 3:
        info.ClearField("type")
    elif tensor.shape.dim:
        tensor.shape.dim[draw.randrange(len(tensor.shape.dim))].dim_value = draw.choice(INTEGERS)
    return f"input or output {info.name}: {str(info.type)[:100]!r}"


def _model(draw: Random, model: Any) -> str:
    """Change versions, functions, or all inputs and outputs."""
    what = draw.randrange(7)
    if what == 0:
        model.ir_version = draw.choice([0, 1, 3, 9, 11, 12, 99, 2**40])
        return f"IR version {model.ir_version}"
    if what == 1 and model.opset_import:
        entry = draw.choice(list(model.opset_import))
        entry.version = draw.choice([0, 1, 7, 13, 22, 26, 99, -1])
        return f"opset {entry.domain!r} {entry.version}"
    if what == 2 and model.opset_import:
        del model.opset_import[draw.randrange(len(model.opset_import))]
        return "an opset less"
    if what == 3 and model.functions:
        function = draw.choice(list(model.functions))
        function.node.add(op_type=function.name, domain=function.domain, input=function.input, output=function.output)
        return f"function {function.name} calls itself"
    if what == 4 and model.functions:
        del model.functions[draw.randrange(len(model.functions))]
        return "a function less"
    if what == 5:
        model.graph.input.pop()
        return "an input less"
    model.graph.output.pop()
    return "an output less"
