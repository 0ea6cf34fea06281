"""Jetsons with 8 GB: limits of their engines, and the check of contiguous memory before a build."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.system.jetson import ContiguousMemory, Jetson, contiguous_memory

SMALL_MEMORY = 12_000_000_000
"""Jetsons with less have 8 GB or 4 GB."""
SUGGESTED_MULTIPLE = 10_000_000
"""A suggested ``--max-block`` is a multiple of so many bytes."""


@dataclass(frozen=True)
class JetsonLimits:
    """Defaults of ``fusion-build`` for a Jetson."""

    compute_capability: str | None = None
    max_block: int | None = None
    workspace: int | None = None


NO_LIMITS = JetsonLimits()
BLOCKS_OF_A_WEIGHT = 2
"""Contiguous memory that a build takes for a weight, over the bytes of that weight. Published for an Orin Nano
(https://github.com/hokwangchoi/jetson-orin-nano-benchmarks, trt_edgellm_cosmos_resolution.md): for a weight of 311 MB,
which built, the free CMA fell to about 300 MB, from 779 to 932 MB when idle: 1.5 to 2 times. A weight of 622 MB failed
with 779 MB free, as the attempts of the first kernel left nothing to the next one."""
LARGEST_CMA = 950_000_000
"""Bytes of CMA, the most that the kernel of an Orin Nano granted in that report; they helped."""
LIMITS = {
    # BLOCKS_OF_A_WEIGHT of these fit in a CMA of 950 MB, the most that the kernel of an Orin Nano granted.
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


class ContiguousMemoryError(FusionError):
    """No free block of a Jetson's memory can hold the weights of an engine."""

    def __init__(self, largest: int, memory: ContiguousMemory) -> None:
        self.facts = (
            f"The weights of an engine need up to {format_bytes(largest)} in one block, and at most "
            f"{format_bytes(memory.largest)} are free ({memory})."
        )
        """The sentence before the remedies."""
        super().__init__(f"{self.facts} {_remedies(memory)} --skip-memory-check builds nevertheless.")


def _remedies(memory: ContiguousMemory) -> str:
    fitting = memory.largest // BLOCKS_OF_A_WEIGHT // SUGGESTED_MULTIPLE * SUGGESTED_MULTIPLE
    suggested = f" (such as {fitting // 1_000_000}MB)" if fitting else ""
    return f"{enlarge_cma(memory)}Build before anything else; or give a smaller --max-block{suggested}."


def enlarge_cma(memory: ContiguousMemory) -> str:
    """Return the remedy of a small CMA, as a sentence with a blank behind it; nothing for a large CMA."""
    if memory.cma_total >= LARGEST_CMA:
        return ""
    return "Add cma=950M to APPEND in /boot/extlinux/extlinux.conf and reboot. "


def check_contiguous_memory(largest: int, memory: ContiguousMemory) -> None:
    """Check that free contiguous memory holds the largest weights of an engine, of ``largest`` bytes.

    Raises :class:`ContiguousMemoryError` if no free block can hold them once: that build fails. Warns if none holds
    them :data:`BLOCKS_OF_A_WEIGHT` times: that build may succeed, as not every kernel needs so much.
    """
    if largest > memory.largest:
        raise ContiguousMemoryError(largest, memory)
    if BLOCKS_OF_A_WEIGHT * largest > memory.largest:
        sys.stderr.write(
            f"warning: The weights of an engine need up to {format_bytes(largest)} in one block. A build may take "
            f"{BLOCKS_OF_A_WEIGHT} times that, and at most {format_bytes(memory.largest)} are free: it may fail. "
            f"{_remedies(memory)}\n"
        )


def out_of_memory_remedy(is_certain: bool, here: Jetson | None, max_block: int | None) -> str:
    """Return what to do about a build that ran out of memory, or that may have, as sentences."""
    if here is None or not is_small(here):
        condition = "Memory ran out;" if is_certain else "If memory ran out,"
        return f"{condition} build with more --parts, or a smaller --max-block, --max-context or --workspace."
    condition = "Memory ran out" if is_certain else "If NvMap has printed errors, memory ran out"
    block = "--max-block 400MB" if max_block is None else f"a --max-block below {format_bytes(max_block)}"
    return (
        f"{condition}, perhaps in one block only. {enlarge_cma(contiguous_memory())}Build with {block}, more --parts "
        "or a smaller --max-context."
    )
