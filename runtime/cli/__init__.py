"""The commands fusion-run and fusion-info, and what all commands share."""
