"""What runs the three graphs: ONNX Runtime and TensorRT."""
