"""The machine: versions, GPU, power mode, and the memory that is free in one block."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.acceptance.steps import Outcome, Workspace
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.latency.machine.nvidia import find_gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT, byte_count, fields
from fusion_edge.runtime.backends.cuda import open_cuda
from fusion_edge.runtime.backends.tensorrt.library import LIBRARIES, find_library
from fusion_edge.runtime.errors import DeviceError
from fusion_edge.runtime.formatting import format_bytes


def check(workspace: Workspace) -> Outcome:
    """Describe the machine."""
    machine = asdict(machine_info(find_gpu()))
    libraries = {name: _library(name) for name in LIBRARIES}
    memory = memory_facts(ROOT)
    installed = ", ".join(f"{name} {version}" for name, version in libraries.items() if version[0].isdigit())
    facts = (
        machine["processor"],
        f"JetPack's Linux {linux}" if (linux := machine["versions"].get("jetson linux")) else "no Jetson",
        installed or "no TensorRT",
        machine["gpu"] or "no GPU",
        f"power mode {machine['power_mode'] or 'unknown'}",
        f"largest free block {format_bytes(memory['largest_free_block'])}",
    )
    return Outcome("; ".join(facts), {"machine": machine, "libraries": libraries, "cuda": _cuda(), "memory": memory})


def _library(name: str) -> str:
    """Return the version of a library, or why it cannot be used."""
    try:
        return find_library(name).version
    except DeviceError as error:
        return str(error)


def _cuda() -> dict[str, Any] | str:
    """Return what CUDA says about the device, or why it cannot be used."""
    try:
        cuda = open_cuda()
        free, total = cuda.memory()
        return {"compute_capability": cuda.compute_capability(), "free": free, "total": total}
    except DeviceError as error:
        return str(error)


def memory_facts(root: Path) -> dict[str, int]:
    """Return bytes of memory, as the kernel reports them below ``root``.

    ``largest_free_block`` is contiguous in physical memory, and at most the largest order of the kernel's allocator.
    ``cma_free`` is the rest of the area for large blocks, which a Jetson's GPU uses; absent if there is none.
    """
    known = fields(root / "proc/meminfo")
    names = {"available": "MemAvailable", "cma_total": "CmaTotal", "cma_free": "CmaFree", "swap_free": "SwapFree"}
    sizes = {key: byte_count(known[name]) for key, name in names.items() if name in known}
    return sizes | {"largest_free_block": largest_free_block((root / "proc/buddyinfo").read_text(encoding="ascii"))}


def largest_free_block(buddyinfo: str) -> int:
    """Return the bytes of the largest free block in ``/proc/buddyinfo``: column k counts blocks of 2^k pages."""
    orders = [
        order
        for line in buddyinfo.splitlines()
        for order, count in enumerate(line.partition("zone")[2].split()[1:])
        if int(count)
    ]
    return os.sysconf("SC_PAGE_SIZE") << max(orders) if orders else 0
