"""The machine: versions, GPU, power mode, and the memory that is free in one block."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fusion_edge.benchmarks.acceptance.device import NoCuda, find_cuda
from fusion_edge.benchmarks.acceptance.steps import Outcome, Workspace
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.latency.machine.nvidia import find_gpu
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.library import LIBRARIES, find_library
from fusion_edge.runtime.errors import DeviceError
from fusion_edge.runtime.system.jetson import contiguous_memory
from fusion_edge.runtime.system.resources import available_memory


def check(workspace: Workspace) -> Outcome:
    """Describe the machine. A GPU that CUDA cannot use is a failure: steps that need it would only be skipped."""
    machine = asdict(machine_info(find_gpu()))
    libraries = {name: _library(name) for name in LIBRARIES}
    cuda = find_cuda()
    available, memory = available_memory(), contiguous_memory()
    installed = ", ".join(f"{name} {version}" for name, version in libraries.items() if version[0].isdigit())
    facts = (
        machine["processor"],
        f"JetPack's Linux {linux}" if (linux := machine["versions"].get("jetson linux")) else "no Jetson",
        installed or "no TensorRT",
        machine["gpu"] or "no GPU",
        f"power mode {machine['power_mode'] or 'unknown'}",
        str(memory),
    )
    summary, sizes = "; ".join(facts), {"available": available, **asdict(memory)}
    figures = {"machine": machine, "libraries": libraries, "cuda": _device(cuda), "memory": sizes}
    if isinstance(cuda, NoCuda):
        return Outcome(f"{cuda} {summary}" if cuda.has_gpu else f"{summary}. {cuda}", figures, cuda.has_gpu)
    return Outcome(summary, figures)


def _library(name: str) -> str:
    """Return the version of a library, or why it cannot be used."""
    try:
        return find_library(name).version
    except DeviceError as error:
        return str(error)


def _device(cuda: Cuda | NoCuda) -> dict[str, Any] | str:
    """Return what CUDA says about the device, or why it cannot be used."""
    if isinstance(cuda, NoCuda):
        return str(cuda)
    free, total = cuda.memory()
    return {"compute_capability": cuda.compute_capability(), "free": free, "total": total}
