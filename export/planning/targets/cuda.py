"""ONNX Runtime on an NVIDIA GPU."""

from __future__ import annotations

from fusion_edge.export.lowering.onnxruntime import OnnxRuntimeOperations
from fusion_edge.export.planning.targets.target import Target

CUDA = Target(
    name="cuda",
    lowering=OnnxRuntimeOperations,
    activations="float16",
    accuracy_levels=(4, 0),
    quantizes_activations=False,
)
