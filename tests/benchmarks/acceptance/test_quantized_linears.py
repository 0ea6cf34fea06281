"""Quantized linears on ONNX Runtime, in the forms of bundles, against the float64 that engines are compared with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.operator_cases import error, outputs
from support.opset24 import needs_opset_24
from support.paths import DEMO_CHECKPOINT

from fusion_edge.benchmarks.acceptance import quantized_linears
from fusion_edge.benchmarks.acceptance.activation_ranges import export_with_ranges
from fusion_edge.benchmarks.acceptance.quantized_linears import FORMS, quantized_linear
from fusion_edge.export import cli
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.engines.decompositions import OPSET, SINCE, decompose_operators
from fusion_edge.runtime.bundle.manifest import graph_file
from fusion_edge.runtime.errors import FusionError

WEIGHT_NODES = {
    "int4-64": ["DequantizeLinear", "MatMul"],
    "int4-128": ["DequantizeLinear", "MatMul"],
    "int8": ["DequantizeLinear", "Transpose", "MatMul"],
    "int8-one-scale": ["DequantizeLinear", "Transpose", "Mul", "MatMul", "Mul", "Mul"],
    "w8a8": ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Transpose", "MatMul"],
    "fp8": ["DequantizeLinear", "Transpose", "MatMul"],
    "fp8-one-scale": ["DequantizeLinear", "Transpose", "Mul", "MatMul", "Mul", "Mul"],
}
"""Operators of a linear by form, in order."""


@needs_opset_24
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_results(form: str, rows: int) -> None:
    case = quantized_linear(form, rows, 256, 384)
    computed = outputs(case)
    assert error(case, computed) <= case.tolerance
    assert case.tolerance < 0.1 * computed.astype(np.float64).std()  # a wrong scale or row is found
    for wrong in (computed * np.float16(1.2), np.roll(computed, 1, axis=-1)):
        with pytest.raises(FusionError, match=r"^y: \d+ of \d+ elements are wrong"):
            error(case, wrong)


@pytest.mark.parametrize("form", FORMS)
def test_results_for_older_versions(form: str) -> None:
    """Their parser reads opset 21."""
    case = quantized_linear(form, 1, 256, 384)
    decompose_operators(case.model, list(SINCE), 1)
    assert {one.version for one in case.model.opset_import if not one.domain} == {OPSET}
    assert error(case, outputs(case)) <= case.tolerance


@pytest.mark.parametrize(("form", "block"), [("int4-64", 64), ("int4-128", 128)])
def test_int4_has_blocks_along_the_inputs(form: str, block: int) -> None:
    model = quantized_linear(form, 1, 256, 384).model
    (dequantize,) = (one for one in model.graph.node if one.op_type == "DequantizeLinear")
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in dequantize.attribute}
    assert attributes == {"axis": 0, "block_size": block}
    shapes = [list(tensor.dims) for tensor in model.graph.initializer]
    assert shapes == [[256, 384], [256 // block, 384]]


@pytest.mark.parametrize(("form", "operators"), WEIGHT_NODES.items())
def test_the_operators_of_a_form(form: str, operators: list[str]) -> None:
    model = quantized_linear(form, 1, 256, 384).model
    assert [node.op_type for node in model.graph.node] == operators


def test_only_w8a8_quantizes_activations_in_8_bits() -> None:
    """Those of FP8 weights are float16 in every bundle."""
    quantizing = {form for form in WEIGHT_NODES if "QuantizeLinear" in WEIGHT_NODES[form]}
    assert quantizing == {"w8a8"}


@pytest.mark.parametrize(
    ("form", "rule", "graph", "linear"),
    [
        ("int8", "vision.*=int8:channel", "vision_encoder", "vision.projector.up"),
        ("int8-one-scale", "llm.*=int8:channel", "llm", "llm.lm_head"),
        ("fp8", "vision.*=fp8", "vision_encoder", "vision.projector.up"),
        ("fp8-one-scale", "llm.*=fp8", "llm", "llm.lm_head"),
        ("w8a8", None, "vision_encoder", "vision.projector.up"),
    ],
)
def test_bundles_have_the_form(
    form: str, rule: str | None, graph: str, linear: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "b"
    if rule is None:
        with Checkpoint(DEMO_CHECKPOINT) as checkpoint:
            weights = match_parameters(checkpoint, read_config(checkpoint)).values()
        export_with_ranges(DEMO_CHECKPOINT, bundle, {one.linear: 1.0 for one in weights if one.kind != "float"})
    else:
        assert cli.main([str(tiny_checkpoint), "-o", str(bundle), "--target=tensorrt", "--fp16", f"--rule={rule}"]) == 0
    model = onnx.load(bundle / graph_file(graph), load_external_data=False)
    ours = quantized_linear(form, 1, 256, 384).model
    assert operators_of(linear, model) == operators_of(linear, ours)
    assert len(operators_of(linear, ours)) > 2


def operators_of(linear: str, model: onnx.ModelProto) -> Counter[str]:
    """Return the operators that are named after a linear: all but its bias and one Mul."""
    return Counter(node.op_type for node in model.graph.node if node.name.startswith(f"{linear}."))


def test_the_sizes_are_those_of_a_linear_of_3b() -> None:
    assert (quantized_linears.INPUTS, quantized_linears.OUTPUTS) == (3072, 8192)
