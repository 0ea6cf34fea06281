"""Read a checkpoint: its configuration, tensor mapping, weights and tokenizer."""
