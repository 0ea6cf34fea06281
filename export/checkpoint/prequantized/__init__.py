"""Layouts of prequantized checkpoints, whose weights are kept bit for bit: GPTQ, compressed-tensors, bitsandbytes."""
