"""TensorRT plugins against a fake of the module ``tensorrt.plugin``. TensorRT itself has not run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import fake_tensorrt_plugin as fake
from fakes.fake_tensorrt_plugin import DataType
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from support import tensorrt_layers
from support.paths import TESTS
from support.tensorrt_layers import FLOATS, SHAPES, WIDTH, types

from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.onnx_functions import alignment
from fusion_edge.kernels.tensorrt_plugins import (
    PLUGINS,
    Plugin,
    enable_aliasing,
    register,
    unsupported_reason,
    use_plugins,
)
from fusion_edge.kernels.triton import recursive_alignment
from fusion_edge.kernels.triton.ahead_of_time import KERNELS, strip_scratch_parameters
from fusion_edge.kernels.triton.kernel_folder import CompiledKernel
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, ALIGNMENT_NORM_EPS
from fusion_edge.runtime.errors import FusionError

OPSET = 21
SIZES = [(1, 1, 1), (1, 16, 40), (3, 36, 200), (4, 144, 900), (0, 16, 7), (2, 0, 5), (0, 0, 1)]
"""Questions, latents per question, rows of the sequence."""
FUNCTIONS: dict[str, FunctionProto] = {
    function.name: function
    for function in (
        alignment.context_attention_function(ALIGNMENT_HEADS, WIDTH // ALIGNMENT_HEADS, "float32", OPSET),
        alignment.add_layer_norm_function(ALIGNMENT_NORM_EPS, OPSET),
        alignment.add_rows_function(OPSET),
    )
}
every_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.operator)


def shape(axes: tuple[int | str, ...], sizes: fake.Sizes) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)


@pytest.fixture
def compilations() -> Iterator[list[tuple[str, str, int, str]]]:
    """Register all plugins for a Jetson Orin; the list of requested compilations.

    Triton's interpreter, which these tests share a process with, compiles nothing.
    """
    calls: list[tuple[str, str, int, str]] = []

    def compiled(kernel: str, architecture: str, width: int, dtype: str) -> CompiledKernel:
        calls.append((kernel, architecture, width, dtype))
        return CompiledKernel(f"{kernel}_kernel", "PTX", 256, 4096)

    fake.QDP_REGISTRY.clear()
    register(fake, "87", compiled)
    yield calls
    fake.QDP_REGISTRY.clear()


@every_plugin
@pytest.mark.usefixtures("compilations")
def test_inputs_and_output_match_the_function(plugin: Plugin) -> None:
    function = FUNCTIONS[plugin.operator]
    assert fake.QDP_REGISTRY[plugin.id].inputs == list(function.input)
    assert len(function.output) == 1
    layer = tensorrt_layers.layer(plugin, DataType.HALF)
    assert layer.output.dtype is DataType.HALF
    assert layer.aliased_input == (0 if plugin.operator == "AddRows" else None)
    sizes = {"R": 2, "q": 5, "L": 30}
    assert layer.output.at(sizes) == shape(SHAPES[plugin.operator][0], sizes)


@every_plugin
@pytest.mark.usefixtures("compilations")
def test_formats(plugin: Plugin, compilations: list[tuple[str, str, int, str]]) -> None:
    """A plugin offers only the network's type, for which the kernel is compiled."""
    for dtype, name in FLOATS.items():
        layer = tensorrt_layers.layer(plugin, dtype)
        assert layer.types == [types(plugin, dtype)]
        assert compilations[-1] == (plugin.kernel, "87", WIDTH, name)


@every_plugin
@pytest.mark.usefixtures("compilations")
def test_type_without_a_kernel(plugin: Plugin) -> None:
    with pytest.raises(FusionError, match=rf"^{plugin.operator} has no kernel for INT64, only for FLOAT, HALF, BF16"):
        tensorrt_layers.layer(plugin, DataType.INT64)


class Recorder:
    """Replaces a kernel and keeps the launch's grid and arguments."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *arguments: Any) -> None:
        self.arguments = arguments


def call(operator: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Run the operator by its PyTorch wrapper, which other tests check."""
    if operator == "ContextAttention":
        q, k, v = inputs
        return recursive_alignment.context_attention(q, k, v, ALIGNMENT_HEADS)
    if operator == "AddLayerNorm":
        x, residual, weight, bias = inputs
        return recursive_alignment.add_layer_norm(x, residual, weight, bias, ALIGNMENT_NORM_EPS)
    x, positions, latents, update = inputs
    recursive_alignment.add_rows(x[0], positions, latents, update)
    return x


@every_plugin
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("compilations")
def test_launch_matches_the_wrapper(
    plugin: Plugin, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dict(zip("RqL", sizes, strict=True))
    layer = tensorrt_layers.layer(plugin, DataType.FLOAT)
    launch = {name: expression.at(named) for name, expression in layer.launch.items()}
    extra = [expression.at(named) for expression in layer.extra]

    recorder = Recorder()
    monkeypatch.setattr(recursive_alignment, f"{plugin.kernel}_kernel", recorder)
    inputs = [
        torch.empty(shape(axes, named), dtype=torch.int64 if name == "positions" else torch.float32)
        for name, axes in zip(plugin.inputs, SHAPES[plugin.operator], strict=True)
    ]
    output = call(plugin.operator, inputs)

    assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == (*recorder.grid, 1, 1)[:3]
    assert launch["grid_x"] > 0
    assert (launch["block_x"], launch["block_y"], launch["block_z"], launch["shared_mem"]) == (256, 1, 1, 4096)
    count = len(inputs)
    pointers, integers = recorder.arguments[:count], recorder.arguments[count : count + len(extra)]
    result, *constants = recorder.arguments[count + len(extra) :]
    assert [pointer.data_ptr() for pointer in pointers] == [tensor.data_ptr() for tensor in inputs]
    assert list(integers) == extra
    assert result.data_ptr() == output.data_ptr()
    assert constants == list(KERNELS[plugin.kernel].constants(WIDTH).values())


@every_plugin
def test_order_of_kernel_parameters(plugin: Plugin) -> None:
    kernel: Any = getattr(recursive_alignment, f"{plugin.kernel}_kernel")
    described = KERNELS[plugin.kernel]
    names = [*described.inputs, *described.integers, "output", *described.constants(WIDTH)]
    assert list(kernel.arg_names) == names


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[str, str, int, int]]:
    """Output of tests/support/tensorrt_layers.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "support.tensorrt_layers"]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {key: tuple(row) for key, row in json.loads(done.stdout).items()}


@every_plugin
@pytest.mark.parametrize("dtype", FLOATS.values())
def test_ptx_has_a_parameter_for_each_argument(
    plugin: Plugin, dtype: str, built: dict[str, tuple[str, str, int, int]]
) -> None:
    name, ptx, threads, integers = built[f"{plugin.operator} {dtype}"]
    entry = re.search(rf"\.visible \.entry {name}\(([^)]*)\)", ptx)
    assert entry is not None
    parameters = re.findall(r"\.param \.(\w+)", entry[1])
    assert parameters == ["u64"] * len(plugin.inputs) + ["u32"] * integers + ["u64"]
    assert f".reqntid {threads}" in ptx
    assert ".target sm_87" in ptx


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


@pytest.mark.usefixtures("compilations")
def test_sizes_must_be_those_of_the_kernel() -> None:
    attention, norm, _ = PLUGINS
    context = (1, "q", 4, WIDTH)
    with pytest.raises(FusionError, match="AddLayerNorm: axis -1 of x must be constant"):
        fake.engine(norm.id, [("R", "q", "D"), ("R", "q", "D"), ("D",), ("D",)], types(norm, DataType.HALF))
    with pytest.raises(FusionError, match="windows of 9 rows, not of 4"):
        fake.engine(attention.id, [("R", "q", WIDTH), context, context], types(attention, DataType.HALF))


@pytest.mark.usefixtures("compilations")
def test_second_registration() -> None:
    with pytest.raises(ValueError, match="already"):
        register(fake, "87")


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


def test_enable_aliasing() -> None:
    module = ModuleType("tensorrt")
    module.__dict__["PreviewFeature"] = SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased")
    features: dict[str, bool] = {}
    enable_aliasing(module, SimpleNamespace(set_preview_feature=features.__setitem__))
    assert features == {"aliased": True}


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
