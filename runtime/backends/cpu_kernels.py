"""Our own kernels for CPUs (``kernels/cpu/``): a library of operators that ONNX Runtime takes in place of its own."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

from fusion_edge.runtime.bundle import Manifest

MODULE = "fusion_edge.kernels.cpu_operators"
ACCURACY_LEVEL = 4
"""What the kernels compute: products in integers, as ``MatMulNBits`` defines its levels."""
FLOATS = frozenset({"fp32", "fp16"})
"""Formats of weights that are not quantized."""


def library() -> Path | None:
    """The library; None if this installation has none."""
    try:
        spec = importlib.util.find_spec(MODULE)
    except ModuleNotFoundError:  # the package that holds it
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def why_not(manifest: Manifest) -> str | None:
    """Why these kernels cannot run a bundle here, a sentence; None if they can."""
    if manifest.target != "cpu":
        return f"They compute in float32, and the bundle was exported for {manifest.target}."
    if manifest.accuracy_level != ACCURACY_LEVEL:
        return f"They multiply at accuracy level {ACCURACY_LEVEL}, and the bundle asks for {manifest.accuracy_level}."
    if FLOATS.issuperset(manifest.weights.values()):
        return "They round the inputs of products, and the bundle is not quantized."
    if library() is None:
        return "They are not installed: x86-64 and a C++ compiler are needed when pip installs fusion-edge."
    if not is_supported():
        return "They are written for x86-64 processors with AVX-512 VNNI."
    return None


def is_supported() -> bool:
    """Whether this processor runs the library, which must be there."""
    function = ctypes.CDLL(str(library())).is_supported
    function.restype = ctypes.c_bool
    return bool(function())
