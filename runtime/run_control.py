"""The control of one question: the stage it is in, what stops it, and its timings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from fusion_edge.runtime.answer import Answer, FinishReason
from fusion_edge.runtime.arguments import LONGEST_WAIT, check_number, short_repr
from fusion_edge.runtime.errors import Cancelled, DeadlineExceeded, FusionError, Stopped, UsageError
from fusion_edge.runtime.stages import SAMPLING, TIMINGS, WAITING

StopReason = Literal["deadline", "cancelled", "closed"]


class StopSignal(Exception):
    """Unwinds a question that has to stop. No caller of fusion-edge sees it."""


class RunControl:
    """The control of one question, from its call to its end. Any thread may call :meth:`stop`."""

    def __init__(self, deadline: float | None = None, on_stage: Callable[[str], None] | None = None) -> None:
        """Start the clock.

        Args:
            deadline: Seconds from now until the question stops. Default: none.
            on_stage: Called with the name of each stage as it begins.

        Raises:
            UsageError: ``deadline`` is no positive finite number, or ``on_stage`` cannot be called.
        """
        if on_stage is not None and not callable(on_stage):
            raise UsageError(f"on_stage is {short_repr(on_stage)}; expected a function of the stage's name.")
        expected = "a number of seconds above 0, or None"
        self.deadline = (
            None if deadline is None else check_number("deadline", deadline, lambda value: value > 0, expected)
        )
        self.due = math.inf if self.deadline is None else time.monotonic() + min(self.deadline, LONGEST_WAIT)
        """When the deadline passes, in seconds of ``time.monotonic``."""
        self.stage = WAITING
        self.timings_ms = dict.fromkeys(TIMINGS.values(), 0.0)
        self._on_stage = on_stage
        self._reason: StopReason | None = None
        self._timing = ""

    @property
    def reason(self) -> StopReason | None:
        """Why the question has to stop; None if it may go on."""
        if self._reason is None and time.monotonic() >= self.due:
            self._reason = "deadline"
        return self._reason

    def stop(self, reason: StopReason) -> None:
        """Make the question stop at its next check. The first reason counts."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raise :class:`StopSignal` if the question has to stop."""
        if self.reason is not None:
            raise StopSignal

    @contextmanager
    def stage_hook(self, stage: str) -> Iterator[None]:
        """Time a stage of the pipeline. Raise :class:`StopSignal` if the question stops before or within it."""
        self._enter(stage)
        start = time.perf_counter()
        try:
            yield
        except FusionError:
            self.check()  # a run that is interrupted fails
            raise
        finally:
            self.timings_ms[self._timing] += 1000 * (time.perf_counter() - start)

    def _enter(self, stage: str) -> None:
        self.check()
        self._timing = TIMINGS.get(stage, self._timing)
        if stage in (self.stage, SAMPLING):
            return
        self.stage = stage
        if self._on_stage is not None:
            self._on_stage(stage)

    @property
    def finish_reason(self) -> FinishReason:
        """Finish reason of an answer that stopped."""
        return "deadline" if self._reason == "deadline" else "cancelled"

    def error(self, partial: Answer | None = None) -> Stopped:
        """Return the error of a question that has stopped, with the part of its answer that was reached."""
        if partial is None:
            partial = Answer("", (), 0, self.finish_reason, self.timings_ms, 0.0)
        stage = "before the first stage" if self.stage == WAITING else f"in stage {self.stage!r}"
        if self._reason == "deadline":
            message = f"The deadline of {self.deadline:g} s passed {stage}; allow more time."
            return DeadlineExceeded(message, self.stage, partial)
        if self._reason == "closed":
            return Cancelled(f"The model was closed {stage}; load the bundle again.", self.stage, partial)
        return Cancelled(f"The question was cancelled {stage}; ask it again.", self.stage, partial)
