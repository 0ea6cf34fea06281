"""Interpreters that emit the model as ONNX graphs: for ONNX Runtime and for TensorRT."""
