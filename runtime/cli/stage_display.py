"""The stage of a question as a line on standard error; nothing if that is not a terminal."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from fusion_edge.runtime.stages import ALIGNMENT, ENCODE_GLOBAL, ENCODE_LOCAL, PREFILL, PREPROCESS
from fusion_edge.runtime.system.status_line import StatusLine

REFRESH_SECONDS = 0.2
STEPS = (PREPROCESS, ENCODE_GLOBAL, ENCODE_LOCAL, ALIGNMENT, PREFILL)
"""Stages before the first token, in order."""


class StageDisplay:
    """Shows the stage with its number and seconds in a ``with`` block, until the first token."""

    def __init__(self) -> None:
        self._line = StatusLine()
        self._is_shown = False
        self._stage, self._since = "", 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="fusion-edge display", daemon=True)
        self._lock = threading.Lock()

    def __enter__(self) -> StageDisplay:
        if self._line.is_terminal:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()
            self._clear()

    def enter(self, stage: str) -> None:
        """Show another stage. Pass this as ``on_stage``."""
        with self._lock:
            self._stage, self._since = stage, time.monotonic()
            if stage not in STEPS:
                self._stage = ""
                self._clear()

    def hide(self) -> None:
        """Clear the line, and show nothing until the next stage."""
        self.enter("")

    def _clear(self) -> None:
        if self._is_shown:  # otherwise the line is the answer's
            self._is_shown = False
            self._line.show("")

    def _refresh(self) -> None:
        while not self._end.wait(REFRESH_SECONDS):
            with self._lock:
                if self._stage:
                    number, seconds = STEPS.index(self._stage) + 1, time.monotonic() - self._since
                    self._is_shown = True
                    self._line.show(f"[{number}/{len(STEPS)}] {self._stage} {seconds:.0f} s")
