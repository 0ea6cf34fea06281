"""What quantization costs in accuracy."""
