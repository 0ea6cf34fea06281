"""Checkpoints that are quantized already: their weights are taken over bit for bit."""
