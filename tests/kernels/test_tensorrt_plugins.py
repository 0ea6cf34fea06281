"""TensorRT plugins: their kernels, where they are supported, and the nodes of a graph that they replace.

``tests/bindings/`` registers them with TensorRT's own module.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from support.compiled_kernels import WIDTH
from support.paths import TESTS

from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.onnx_functions import alignment
from fusion_edge.kernels.tensorrt_plugins import DTYPES, PLUGINS, Plugin, unsupported_reason, use_plugins
from fusion_edge.kernels.triton import recursive_alignment
from fusion_edge.kernels.triton.ahead_of_time import KERNELS, strip_scratch_parameters
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, ALIGNMENT_NORM_EPS
from fusion_edge.runtime.errors import FusionError

OPSET = 21
FUNCTIONS: dict[str, FunctionProto] = {
    function.name: function
    for function in (
        alignment.context_attention_function(ALIGNMENT_HEADS, WIDTH // ALIGNMENT_HEADS, "float32", OPSET),
        alignment.add_layer_norm_function(ALIGNMENT_NORM_EPS, OPSET),
        alignment.add_rows_function(OPSET),
    )
}
every_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.operator)


@every_plugin
def test_inputs_are_those_of_the_function(plugin: Plugin) -> None:
    function = FUNCTIONS[plugin.operator]
    assert plugin.inputs == tuple(function.input)
    assert len(function.output) == 1


@every_plugin
def test_order_of_kernel_parameters(plugin: Plugin) -> None:
    kernel: Any = getattr(recursive_alignment, f"{plugin.kernel}_kernel")
    described = KERNELS[plugin.kernel]
    names = [*described.inputs, *described.integers, "output", *described.constants(WIDTH)]
    assert list(kernel.arg_names) == names


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Output of tests/support/compiled_kernels.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "support.compiled_kernels"]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return kernels


@every_plugin
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_ptx_has_a_parameter_for_each_argument(plugin: Plugin, dtype: str, compiled: dict[str, dict[str, Any]]) -> None:
    kernel, described = compiled[f"{plugin.operator} {dtype}"], KERNELS[plugin.kernel]
    entry = re.search(rf"\.visible \.entry {kernel['name']}\(([^)]*)\)", kernel["ptx"])
    assert entry is not None
    parameters = re.findall(r"\.param \.(\w+)", entry[1])
    assert parameters == ["u64"] * len(plugin.inputs) + ["u32"] * len(described.integers) + ["u64"]
    assert f".reqntid {kernel['threads']}" in kernel["ptx"]
    assert ".target sm_87" in kernel["ptx"]


PTX = """.visible .entry one_kernel(
	.param .u64 .ptr .global .align 1 one_kernel_param_0,
	.param .u64 .ptr .global .align 1 one_kernel_param_1
)
{
	ld.param.b64 	%rd1, [one_kernel_param_0];
}
"""


def test_scratch_memory() -> None:
    assert strip_scratch_parameters(PTX, 2) == PTX
    assert strip_scratch_parameters(PTX, 1) == PTX.replace(
        ",\n\t.param .u64 .ptr .global .align 1 one_kernel_param_1", ""
    )
    with pytest.raises(FusionError, match="one_kernel_param_1"):
        strip_scratch_parameters(PTX.replace("[one_kernel_param_0]", "[one_kernel_param_1]"), 1)


def tensorrt(name: str, version: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    return module


@pytest.mark.parametrize("version", ["10.9.0.34", "10.13.3", "11.0.0"])
def test_supported(version: str) -> None:
    assert unsupported_reason(tensorrt("tensorrt", version), "87", has_kernels=False) is None


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("tensorrt", "10.13.3", "There are no kernels for sm_75, only for 80, 86, 87, 89, 90, 110, 120"),
        ("tensorrt", "10.3.0.26", "TensorRT 10.3 has no ahead-of-time plugins (needs 10.9)"),
        ("tensorrt", "8.6.1", "TensorRT 8.6 has no ahead-of-time plugins (needs 10.9)"),
        ("tensorrt_rtx", "11.2.0", "TensorRT-RTX has no plugins"),
    ],
)
def test_not_supported(name: str, version: str, reason: str) -> None:
    consequence = "the recursive alignment runs as standard operators"
    assert unsupported_reason(tensorrt(name, version), "75", has_kernels=True) == f"{reason}: {consequence}"


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_plugins, "find_spec", lambda name: None if name == "triton" else name)
    reason = unsupported_reason(tensorrt("tensorrt", "10.13.3"), "87", has_kernels=False)
    assert reason is not None
    assert reason.startswith(
        "No --kernels, and triton not installed (pip install '.[kernels]' in a clone of fusion-edge)"
    )
    assert unsupported_reason(tensorrt("tensorrt", "10.13.3"), "87", has_kernels=True) is None


def alignment_model() -> ModelProto:
    """Return a graph of AddLayerNorm, with AddRows and other operators in branches."""
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["R", "q", WIDTH]) for name in ("a", "b", "y")]
    norm = helper.make_node("AddLayerNorm", ["a", "b", "weight", "bias"], ["normed"], domain="fusion_edge")
    put = helper.make_node("AddRows", ["x", "positions", "normed", "b"], ["out"], domain="fusion_edge")
    gelu = helper.make_node("Gelu", ["a"], ["out"])
    other = helper.make_node("AddRows", ["a"], ["other"], domain="elsewhere")
    then, otherwise = (GraphProto(name=name, node=nodes) for name, nodes in (("then", [put]), ("else", [gelu, other])))
    branch = helper.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=otherwise)
    graph = helper.make_graph([norm, branch], "g", rows[:2], rows[2:])
    return helper.make_model(graph, functions=list(FUNCTIONS.values()))


def attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_use_plugins() -> None:
    model = alignment_model()
    assert use_plugins(model) == 2
    norm, branch = model.graph.node
    branches = attributes(branch)
    for node in (norm, *branches["then_branch"].node):
        assert attributes(node) == {"plugin_namespace": b"fusion_edge", "aot": 1}
    assert not any(map(attributes, branches["else_branch"].node))
    assert not model.functions


def test_a_model_without_these_operators_does_not_change() -> None:
    graph = helper.make_graph([helper.make_node("Gelu", ["a"], ["y"])], "g", [], [])
    model = helper.make_model(graph)
    before = model.SerializeToString()
    assert use_plugins(model) == 0
    assert model.SerializeToString() == before
