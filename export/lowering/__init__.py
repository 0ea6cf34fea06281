"""The operations as ONNX graphs, for ONNX Runtime and for TensorRT."""
