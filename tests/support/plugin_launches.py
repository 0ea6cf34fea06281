"""Launches of the plugins' kernels, as the plugins describe them to TensorRT, for the PTX interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from fakes.fake_tensorrt_plugin import FakePlugins
from support.alignment_cases import Array, Case

from fusion_edge.kernels.ptx.machine import run
from fusion_edge.kernels.tensorrt_plugins import DTYPES, PLUGINS, register
from fusion_edge.kernels.triton.kernel_folder import KernelFolder


@dataclass(frozen=True)
class Launch:
    """A kernel, and what TensorRT launches it with."""

    ptx: str
    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    inputs: tuple[Array, ...]
    integers: tuple[int, ...]
    output: Array

    def run(self) -> None:
        """Run it in the interpreter. Pointers to inputs, integers, pointers to outputs: TensorRT's order."""
        arguments: list[Array | int] = [*self.inputs, *self.integers, self.output]
        run(self.ptx, grid=self.grid, block=self.block, arguments=arguments, shared_bytes=self.shared_bytes)


def launch(case: Case, folder: Path, architecture: str) -> Launch:
    """Return the launch that the operator's plugin describes for its inputs, with a kernel of ``folder``."""
    (plugin,) = (plugin for plugin in PLUGINS if plugin.operator == case.operator)
    dtype = SimpleNamespace(name=next(name for name, triton in DTYPES.items() if triton == case.dtype))
    tensors = [SimpleNamespace(shape=one.shape, shape_expr=one.shape, dtype=dtype) for one in case.inputs]
    plugins = FakePlugins()
    register(plugins, architecture, KernelFolder(folder))
    _, ptx, parameters, integers = plugins.registered[plugin.id]["aot_impl"](*tensors, None, None)
    grid = (parameters.grid_x, parameters.grid_y)
    return Launch(ptx, grid, parameters.block_x, parameters.shared_mem, case.inputs, integers, case.output)
