"""Backends that run the three graphs, ONNX Runtime and TensorRT, and the choice of a device."""
