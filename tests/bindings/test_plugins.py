"""Our plugins in TensorRT's own ``tensorrt.plugin``: described, tuned and launched as by a builder, without a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from bindings.expressions import Sizes, names_that_differ
from bindings.plugin_layer import AXES, Layer, layer

from fusion_edge.kernels.tensorrt_plugins import DTYPES, PLUGINS, Plugin, register
from fusion_edge.kernels.triton import recursive_alignment
from fusion_edge.kernels.triton.ahead_of_time import CONTEXT_ROWS, KERNELS
from fusion_edge.kernels.triton.kernel_folder import CompiledKernel
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, ALIGNMENT_NORM_EPS
from fusion_edge.runtime.errors import FusionError

WIDTH, THREADS, SHARED_BYTES = 64, 256, 4096
ROWS = ("R", "q", WIDTH)
CONTEXT = (1, "q", CONTEXT_ROWS, WIDTH)
SHAPES: dict[str, list[tuple[int | str, ...]]] = {
    "ContextAttention": [ROWS, CONTEXT, CONTEXT],
    "AddLayerNorm": [ROWS, ROWS, (WIDTH,), (WIDTH,)],
    "AddRows": [(1, "L", WIDTH), ("R", "q"), ROWS, ROWS],
}
SIZES = [(1, 1, 1), (1, 16, 40), (3, 36, 200), (4, 144, 900), (0, 16, 7), (2, 0, 5), (0, 0, 1)]
"""Questions, latents per question, rows of the sequence."""
every_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.operator)


class Registered:
    """All plugins, registered for a Jetson Orin."""

    def __init__(self, trt: ModuleType, trtp: ModuleType) -> None:
        self._trt = trt
        self.compilations: list[tuple[str, str, int, str]] = []
        """Requested kernels. Triton's interpreter, which these tests share a process with, compiles nothing."""
        register(trtp, "87", self._compiled)

    def _compiled(self, kernel: str, architecture: str, width: int, dtype: str) -> CompiledKernel:
        self.compilations.append((kernel, architecture, width, dtype))
        return CompiledKernel(f"{kernel}_kernel", f"PTX of {dtype}", THREADS, SHARED_BYTES)

    def types(self, plugin: Plugin, dtype: str) -> list[Any]:
        """Return the types of the inputs and the output."""
        names = ["INT64" if name == "positions" else dtype for name in (*plugin.inputs, "output")]
        return [getattr(self._trt.DataType, name) for name in names]

    def layer(self, plugin: Plugin, dtype: str, *shapes: tuple[int | str, ...]) -> Layer:
        return layer(self._trt, plugin.id, shapes or SHAPES[plugin.operator], self.types(plugin, dtype))


@pytest.fixture
def plugins(trt: ModuleType, trtp: ModuleType) -> Registered:
    return Registered(trt, trtp)


def shape(axes: tuple[int | str, ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)


def test_stand_ins_have_the_names_of_the_classes(trt_with_plugins: ModuleType) -> None:
    assert names_that_differ(trt_with_plugins) == []


@every_plugin
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(plugin: Plugin, dtype: str, plugins: Registered) -> None:
    """The output is like the first input. Only the network's types are offered: the kernel is compiled for them."""
    built = plugins.layer(plugin, dtype)
    *_, output = types = plugins.types(plugin, dtype)
    assert (built.outputs, built.output_types) == (1, [output])
    sizes = {"R": 2, "q": 5, "L": 30}
    assert tuple(axis.at(sizes) for axis in built.output_shape) == shape(SHAPES[plugin.operator][0], sizes)
    assert built.aliased_input == (0 if plugin.operator == "AddRows" else -1)
    assert built.types == types
    assert {one.name for one in built.formats} == {"LINEAR"}
    assert built.tactics == []
    assert plugins.compilations == [(plugin.kernel, "87", WIDTH, DTYPES[dtype])]
    assert built.kernel == (f"{plugin.kernel}_kernel", f"PTX of {DTYPES[dtype]}".encode())
    assert len(built.arguments) == len(KERNELS[plugin.kernel].integers)


@every_plugin
def test_type_without_a_kernel(plugin: Plugin, plugins: Registered) -> None:
    with pytest.raises(FusionError, match=rf"^{plugin.operator} has no kernel for INT32, only for FLOAT, HALF, BF16"):
        plugins.layer(plugin, "INT32")


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
def test_launch_matches_the_wrapper(
    plugin: Plugin, sizes: tuple[int, int, int], plugins: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dict(zip("RqL", sizes, strict=True))
    built = plugins.layer(plugin, "FLOAT")
    launch = {axis: expression.at(named) for axis, expression in built.launch.items()}
    integers = [expression.at(named) for expression in built.arguments]

    recorder = Recorder()
    monkeypatch.setattr(recursive_alignment, f"{plugin.kernel}_kernel", recorder)
    inputs = [
        torch.empty(shape(axes, named), dtype=torch.int64 if name == "positions" else torch.float32)
        for name, axes in zip(plugin.inputs, SHAPES[plugin.operator], strict=True)
    ]
    output = call(plugin.operator, inputs)

    grid = (*recorder.grid, 1, 1)[:3]
    assert launch == dict(zip((*AXES, "shared_mem"), (*grid, THREADS, 1, 1, SHARED_BYTES), strict=True))
    assert launch["grid_x"] > 0
    pointers, passed = recorder.arguments[: len(inputs)], recorder.arguments[len(inputs) :]
    assert [pointer.data_ptr() for pointer in pointers] == [tensor.data_ptr() for tensor in inputs]
    assert list(passed[: len(integers)]) == integers
    result, *constants = passed[len(integers) :]
    assert result.data_ptr() == output.data_ptr()
    assert constants == list(KERNELS[plugin.kernel].constants(WIDTH).values())


def test_sizes_must_be_those_of_the_kernel(plugins: Registered) -> None:
    attention, norm, _ = PLUGINS
    short, unknown = (1, "q", 4, WIDTH), ("R", "q", "D")
    with pytest.raises(FusionError, match="AddLayerNorm: axis -1 of x must be constant"):
        plugins.layer(norm, "HALF", unknown, unknown, ("D",), ("D",))
    with pytest.raises(FusionError, match="windows of 9 rows, not of 4"):
        plugins.layer(attention, "HALF", ROWS, short, short)


@pytest.mark.usefixtures("plugins")
def test_second_registration(trtp: ModuleType) -> None:
    with pytest.raises(ValueError, match="already"):
        register(trtp, "87")
