"""ONNX Runtime on CPUs and NVIDIA GPUs."""

import os

# The Linux wheels of ONNX Runtime 1.29 and later record telemetry and send it, unless this is set before their library
# loads. https://github.com/microsoft/onnxruntime/pull/27379
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
