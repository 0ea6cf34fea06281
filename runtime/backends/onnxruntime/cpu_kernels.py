"""Our own kernels for CPUs (``kernels/cpu/``): a library of operators that ONNX Runtime takes in place of its own.

And in place of functions of the graphs, which it would inline.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from fusion_edge.runtime.bundle.graphs import VISION_ENCODER
from fusion_edge.runtime.bundle.manifest import Manifest

LIBRARY = Path(__file__).parents[3] / "kernels/cpu_operators.so"
ACCURACY_LEVEL = 4
"""What the kernels compute: linear products in integers, as ``MatMulNBits`` defines levels; attention in bfloat16."""
FLOATS = frozenset({"fp32", "fp16"})
"""Formats of weights that are not quantized."""


def library() -> Path | None:
    """Return the library's file; None if this installation has none."""
    return LIBRARY if LIBRARY.is_file() else None


def unsupported_reason(manifest: Manifest) -> str | None:
    """Why these kernels cannot run a bundle here, a sentence; None if they can."""
    if manifest.target != "cpu":
        return f"They compute in float32, and the bundle was exported for {manifest.target}."
    if manifest.accuracy_level != ACCURACY_LEVEL:
        return f"They multiply at accuracy level {ACCURACY_LEVEL}, and the bundle asks for {manifest.accuracy_level}."
    if FLOATS.issuperset(manifest.weights.values()):
        return "They round to integers and bfloat16, and the bundle is not quantized."
    if library() is None:
        return "They are not installed: pip needs x86-64 and GCC's C++ compiler to install them."
    try:
        if not is_supported():
            return "They are written for x86-64 processors with AVX-512 VNNI."
    except OSError as error:  # of a library that was built elsewhere
        return f"They cannot be loaded ({error}); install fusion-edge again."
    return None


def can_run(manifest: Manifest, graph: str) -> bool:
    """Whether they run a graph of a bundle here: not one whose weights are all floats, which is to be exact."""
    is_vision = graph == VISION_ENCODER
    forms = {form for name, form in manifest.weights.items() if name.startswith("vision.") == is_vision}
    return unsupported_reason(manifest) is None and not forms <= FLOATS


def is_supported() -> bool:
    """Whether this processor runs the library, which must be there."""
    function = ctypes.CDLL(str(library())).is_supported
    function.restype = ctypes.c_bool
    return bool(function())
