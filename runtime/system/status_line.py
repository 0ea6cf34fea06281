"""A line on standard error that is overwritten; nothing if that is not a terminal."""

from __future__ import annotations

import sys


class StatusLine:
    """Shows one line at a time. Not thread-safe."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        """Whether the line can be seen. False, too, once the terminal is closed: the work continues."""

    def show(self, line: str) -> None:
        """Replace the line. An empty one clears it."""
        if not self.is_terminal:
            return
        try:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        except OSError:
            self.is_terminal = False
