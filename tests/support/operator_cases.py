"""Cases of single operators on ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fusion_edge.benchmarks.acceptance.comparison import largest_error
from fusion_edge.benchmarks.acceptance.engine import OperatorCase


def outputs(case: OperatorCase) -> npt.NDArray[Any]:
    """Return the only output, computed as the graph says: ONNX Runtime's fusions would quantize activations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = case.model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (array,) = session.run(None, dict(case.inputs))
    return np.asarray(array)


def error(case: OperatorCase, actual: npt.NDArray[Any]) -> float:
    """Return the largest error of the only output. Raises :class:`FusionError` for a wrong one."""
    ((name, expected),) = case.expected.items()
    return largest_error(name, actual, expected, case.tolerance)
