"""Jetsons with 8 GB: limits of their engines, and the check of contiguous memory before a build."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.system.jetson import ContiguousMemory, Jetson

SMALL_MEMORY = 12_000_000_000
"""Jetsons with less have 8 GB or 4 GB."""


@dataclass(frozen=True)
class JetsonLimits:
    """Defaults of ``fusion-build`` for a Jetson."""

    compute_capability: str | None = None
    max_block: int | None = None
    workspace: int | None = None


NO_LIMITS = JetsonLimits()
LIMITS = {
    # Two such blocks fit in a CMA of 950 MB, the most that the kernel of an Orin Nano granted (docs/jetson.md).
    "orin-nano": JetsonLimits("8.7", max_block=400_000_000, workspace=512_000_000)
}
"""By value of ``--for``."""


def is_small(here: Jetson | None) -> bool:
    """Return whether a machine is a Jetson whose contiguous memory limits engines."""
    return here is not None and here.memory < SMALL_MEMORY


def jetson_limits(requested: str | None, here: Jetson | None) -> JetsonLimits:
    """Return the limits for the ``--for`` of the command, or else for this machine."""
    if requested is not None:
        return LIMITS[requested]
    return LIMITS["orin-nano"] if is_small(here) else NO_LIMITS


def check_device(requested: str, compute_capability: str, here: Jetson | None) -> None:
    """Warn if kernels are timed on another device than they run on.

    Raises :class:`UsageError` if engines for ``compute_capability`` do not run there at all.
    """
    needed = LIMITS[requested].compute_capability
    if compute_capability != needed:
        raise UsageError(
            f"--for {requested} needs compute capability {needed}, and this build is for {compute_capability}; run "
            "it on a Jetson Orin with the TensorRT of that device."
        )
    if not is_small(here):
        machine = "machine" if here is None else here.model
        sys.stderr.write(
            f"note: kernels are timed on this {machine}; they run on the {requested}, where others may be faster\n"
        )


def check_contiguous_memory(largest: int, memory: ContiguousMemory) -> None:
    """Raise :class:`FusionError` with the remedies if no free block can hold ``largest`` bytes."""
    if largest > memory.largest:
        fitting = f" (such as {memory.largest // 10_000_000 * 10}MB)" if memory.largest >= 10_000_000 else ""
        raise FusionError(
            f"The weights of an engine need up to {format_bytes(largest)} in one block, and at most "
            f"{format_bytes(memory.largest)} are free ({memory}). Add cma=950M to APPEND in "
            f"/boot/extlinux/extlinux.conf; reboot, and build before anything else; or give a smaller --max-block"
            f"{fitting}. --skip-memory-check builds nevertheless."
        )
