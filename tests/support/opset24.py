"""Skip mark for ONNX Runtime 1.23, the last for Python 3.10: it lacks opset 24, which TensorRT graphs use."""

from __future__ import annotations

import onnxruntime as ort
import pytest

KNOWS_OPSET_24 = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)
NO_OPSET_24 = f"ONNX Runtime {ort.__version__} has no opset 24"
needs_opset_24 = pytest.mark.skipif(not KNOWS_OPSET_24, reason=NO_OPSET_24)
