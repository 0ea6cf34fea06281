"""Reads a checkpoint: its configuration, the mapping of its tensors, its weights and its tokenizer."""
