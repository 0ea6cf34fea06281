"""The Jetson that this process runs on, and the memory that it has in one block.

CPU and GPU of a Jetson share their memory. NVIDIA's driver takes some large allocations from the kernel's contiguous
memory (CMA), 256 MB by default; on an Orin Nano with 8 GB, engines failed to build for want of it with gigabytes free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fusion_edge.runtime.system.resources import ROOT, memory_fields

DEVICE_TREE = Path("proc/device-tree")
TEGRA = b"nvidia,tegra"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ContiguousMemory:
    """Free memory by the size of its blocks, in bytes."""

    block: int
    """Size of the largest free blocks of the kernel's allocator. It has none of more than a few MB."""
    blocks: int
    """Number of these."""
    cma_free: int
    """Free memory of CMA, from which the kernel makes larger blocks: at most one of this size."""
    cma_total: int

    @property
    def largest(self) -> int:
        """Upper bound of the largest block that can be allocated."""
        return max(self.block, self.cma_free)

    def __str__(self) -> str:
        return (
            f"{self.blocks} free blocks of {self.block / 1e6:.1f} MB; CMA has {self.cma_free / 1e6:.0f} of "
            f"{self.cma_total / 1e6:.0f} MB free"
        )


@dataclass(frozen=True)
class Jetson:
    """A Jetson."""

    model: str
    """Such as ``NVIDIA Jetson Orin Nano Developer Kit``."""
    memory: int
    """Bytes of memory, without what the firmware keeps."""


def this_jetson(root: Path = ROOT) -> Jetson | None:
    """Return the Jetson that this is; None on another machine. ``root`` holds ``/proc``."""
    try:
        compatible = (root / DEVICE_TREE / "compatible").read_bytes()
        model = (root / DEVICE_TREE / "model").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    if not any(one.startswith(TEGRA) for one in compatible.split(b"\0")):
        return None
    return Jetson(model.rstrip("\0"), memory_fields((root / "proc/meminfo").read_text(encoding="ascii"))["MemTotal"])


def contiguous_memory(root: Path = ROOT) -> ContiguousMemory:
    """Return the free contiguous memory. ``root`` holds ``/proc``."""
    block, blocks = largest_blocks((root / "proc/buddyinfo").read_text(encoding="ascii"), PAGE_BYTES)
    fields = memory_fields((root / "proc/meminfo").read_text(encoding="ascii"))
    return ContiguousMemory(block, blocks, fields.get("CmaFree", 0), fields.get("CmaTotal", 0))


def largest_blocks(buddyinfo: str, page: int) -> tuple[int, int]:
    """Return size in bytes and number of the largest free blocks in the text of ``/proc/buddyinfo``.

    A line has the numbers of free blocks of 1, 2, 4, ... pages of a zone, as in ``Node 0, zone DMA 1 0 2``. Without a
    free block both are 0.
    """
    counts: dict[int, int] = {}
    for line in buddyinfo.splitlines():
        _, _, zone = line.partition("zone")
        for order, count in enumerate(map(int, zone.split()[1:])):
            counts[order] = counts.get(order, 0) + count
    free = [order for order, count in counts.items() if count]
    return (page << max(free), counts[max(free)]) if free else (0, 0)
