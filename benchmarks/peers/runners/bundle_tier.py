"""Tier of our kernels that a bundle runs on."""

from __future__ import annotations

from fusion_edge.benchmarks.peers.runners.instruction_sets import INSTRUCTION_SETS
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.bundle.manifest import Manifest


def choose_tier(manifest: Manifest, graph: str, isa: str | None) -> str | None:
    """Make the kernels use the tier of an instruction set, if given; return the tier in use, None without our kernels.

    ONNX Runtime's other operators take a small share of the time and use what the processor has.

    Raises:
        CannotRunError: Our kernels do not run the graph with this instruction set.
    """
    runs = cpu_kernels.can_run(manifest, graph)
    if isa is None:
        return cpu_kernels.tier() if runs else None
    tier = INSTRUCTION_SETS[isa].tier
    if not runs or not cpu_kernels.use_tier(tier):
        raise CannotRunError(f"Our kernels do not run {graph} with {tier} here; see fusion-info.")
    return tier
