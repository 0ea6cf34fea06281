"""Find our CPU kernels (``kernels/cpu/``) and check whether they can run a bundle on this machine.

The kernels are a library of custom operators. They replace operators of ONNX Runtime and functions of the graphs.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from pathlib import Path

from fusion_edge.runtime.bundle.graphs import VISION_ENCODER
from fusion_edge.runtime.bundle.manifest import Manifest

LIBRARY = Path(__file__).parents[3] / "kernels/cpu_operators.so"
ACCURACY_LEVEL = 4
"""Accuracy of the kernels, as ``MatMulNBits`` defines it: 4 is int8 GEMM."""
ARCHITECTURES = {
    "x86_64": ("AVX2", "AVX-VNNI", "AVX-512 VNNI", "AMX"),
    "aarch64": ("NEON dot product", "NEON i8mm"),
}
"""Tiers of instructions that the kernels are written for, by architecture, the fastest last."""
TIERS = ARCHITECTURES.get(platform.machine(), ())
"""Those of this machine's architecture."""
NOT_COMPILED = (
    "They are not compiled: with AVX-512, prefill takes two to three times as long, and a decode step 1.5 times. "
    "Install GCC 11 or newer (Debian: apt install g++), then fusion-edge again."
)
"""Reason of an installation without a compiler."""
FLOATS = frozenset({"fp32", "fp16"})
"""Formats of unquantized weights."""


def library() -> Path | None:
    """Return the path of the library; None if it is not installed."""
    return LIBRARY if LIBRARY.is_file() else None


def unsupported_reason(manifest: Manifest) -> str | None:
    """Return the reason why the kernels cannot run a bundle on this machine, as a sentence; None if they can."""
    if manifest.target != "cpu":
        return f"They compute in float32, and the bundle was exported for {manifest.target}."
    if manifest.accuracy_level != ACCURACY_LEVEL:
        return f"They compute at accuracy level {ACCURACY_LEVEL}, and the bundle has {manifest.accuracy_level}."
    if FLOATS.issuperset(manifest.weights.values()):
        return "Their linear layers compute in int8, and the bundle is not quantized."
    if library() is None:
        return NOT_COMPILED if platform.machine() in ARCHITECTURES else f"They need {processor_needed()}."
    try:
        if not is_supported():
            return f"They need {processor_needed()}."
    except (OSError, AttributeError) as error:  # the library is of another system, or older than these files
        return f"They cannot be loaded ({error}); install fusion-edge again."
    return None


def can_run(manifest: Manifest, graph: str) -> bool:
    """Return whether the kernels run a graph. A graph with only float weights stays exact without them."""
    is_vision = graph == VISION_ENCODER
    formats = {kind for name, kind in manifest.weights.items() if name.startswith("vision.") == is_vision}
    return unsupported_reason(manifest) is None and not formats <= FLOATS


def processor_needed() -> str:
    """Return what processor the kernels need, for a message."""
    return "a processor with " + " or ".join(f"{tiers[0]} ({name})" for name, tiers in ARCHITECTURES.items())


def is_supported() -> bool:
    """Return whether this processor can run the library, which must be installed."""
    return tier() is not None


def tier() -> str | None:
    """Return the fastest tier of instructions that this processor and the library have; None if there is none.

    The library must be installed. Raises OSError if it was built for another system.
    """
    return found[-1] if (found := tiers()) else None


def tiers() -> tuple[str, ...]:
    """Return the tiers that this processor and the library have, the fastest last.

    The library must be installed. Raises OSError if it was built for another system.
    """
    function = ctypes.CDLL(str(library())).tiers
    function.restype = ctypes.POINTER(ctypes.c_char_p)
    names = function()  # None ends them
    return tuple(name.decode() for name in itertools.takewhile(bool, (names[i] for i in itertools.count())))


def use_threads(count: int) -> None:
    """Tell the kernels the number of threads that sessions have, for which they divide work."""
    function = ctypes.CDLL(str(library())).use_threads
    function.argtypes = (ctypes.c_size_t,)
    function(count)


def use_tier(name: str) -> bool:
    """Make the kernels use a tier of :data:`TIERS`, for tests and benchmarks; return whether this processor has it."""
    function = ctypes.CDLL(str(library())).use_tier
    function.restype = ctypes.c_bool
    return bool(function(name.encode()))
