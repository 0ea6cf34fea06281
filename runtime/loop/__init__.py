"""Questions from a robot's loop: a worker thread answers about the newest frames, and nothing blocks the loop."""
