"""What an export will write: options, targets, formats of weights, files and memory."""
