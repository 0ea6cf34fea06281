"""Instruction sets that all engines of a comparison can be held to. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class InstructionSet:
    """One x86-64 instruction set, as each engine names it."""

    tier: str
    """Tier of our kernels (``cpu_kernels.TIERS``)."""
    onednn: str
    """Limit of oneDNN, in OpenVINO and PyTorch."""
    pytorch: str
    """Limit of PyTorch's own kernels."""
    feature: str
    """Feature that a build of llama.cpp for it has."""
    newer: tuple[str, ...]
    """Beginnings of the names of features that such a build lacks."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Return the environment variables that hold OpenVINO and PyTorch to it.

        OpenVINO's copy of oneDNN reads either of the first two, depending on its release.
        """
        return {
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "DNNL_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.pytorch,
            "MKL_ENABLE_INSTRUCTIONS": self.pytorch.upper(),
        }


INSTRUCTION_SETS: Mapping[str, InstructionSet] = {
    "avx512_vnni": InstructionSet(
        "AVX-512 VNNI", "AVX512_CORE_VNNI", "avx512", "AVX512_VNNI", ("AMX_", "AVX512_BF16", "AVX512_FP16")
    ),
    "avx_vnni": InstructionSet("AVX-VNNI", "AVX2_VNNI", "avx2", "AVX_VNNI", ("AMX_", "AVX512")),
    "avx2": InstructionSet("AVX2", "AVX2", "avx2", "AVX2", ("AMX_", "AVX512", "AVX_VNNI")),
}
"""By the name of ``--isa``."""
