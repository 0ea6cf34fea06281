"""The plan of an export: options, targets, formats of weights, files and memory."""
