"""ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion_edge.export.lowering.onnxruntime import OnnxRuntimeOperations
from fusion_edge.export.planning.targets.target import ARENA_GROWTH, Target
from fusion_edge.runtime.bundle.config import FusionConfig


class CpuTarget(Target):
    """ONNX Runtime on a CPU. Arenas shrink after each graph's run, so the graphs share memory."""

    def activation_bytes(self, config: FusionConfig, max_context: int, graph_elements: Sequence[int]) -> int:
        return ARENA_GROWTH * max(graph_elements) * np.dtype(self.activations).itemsize


CPU = CpuTarget(
    name="cpu",
    lowering=OnnxRuntimeOperations,
    activations="float32",
    accuracy_levels=(4, 0),
    kv_caches=("float", "int8"),
    # MatMulNBits keeps each scale, a packed copy and the sum of its block (measured). Our own kernels keep none; the
    # estimate is for a CPU without them.
    scale_copies=3,
)
