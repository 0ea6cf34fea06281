"""``fusion-run`` and ``fusion-info``, and the frame of all commands."""
