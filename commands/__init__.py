"""Entry points of the commands, and the signals that end them. It imports nothing heavy."""
