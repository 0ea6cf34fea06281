"""A pseudo-terminal: a command on it, and the lines that its screen shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SPLIT = re.compile(r"(\x1b\[K|\r|\n)")


class Terminal:
    """Runs Python code on a terminal of its own. Standard output and error are both the terminal."""

    def __init__(self, code: str, arguments: Sequence[str | Path]) -> None:
        self._master, slave = os.openpty()
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.printed = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until ``text`` has been printed after the last wait."""
        start = len(self.printed)
        due = time.monotonic() + 60
        while text not in self.printed[start:]:
            assert time.monotonic() < due, self.printed
            assert self._read(), self.printed

    def finish(self) -> int:
        """Read to the end and return the exit code."""
        while self._read():
            pass
        os.close(self._master)
        return self.process.wait(20)

    def _read(self) -> bool:
        try:
            part = os.read(self._master, 4096)
        except OSError:  # the command has ended
            return False
        self.printed += part.decode()
        return bool(part)

    @property
    def screen(self) -> list[str]:
        """The lines that are left on the screen."""
        lines, column = [""], 0
        for part in SPLIT.split(self.printed):
            if part == "\n":
                lines.append("")
            elif part == "\r":
                column = 0
            elif part == "\x1b[K":
                lines[-1] = lines[-1][:column]
            else:
                lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
                column += len(part)
        return lines
