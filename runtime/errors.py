"""Errors that a user can cause. Any other exception is a defect of fusion-edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion_edge.runtime.answer import Answer


class FusionError(Exception):
    """An invalid input, or something that the machine lacks.

    The message names the thing, what was expected and the remedy. Commands print it as one line and exit with
    :attr:`exit_code`.
    """

    exit_code = 1

    def __str__(self) -> str:
        """Return the message as one printable line, with control characters and invalid UTF-8 escaped."""
        return printable(" ".join(super().__str__().split("\n")))


class UsageError(FusionError):
    """A wrong command line or argument value (exit code 2)."""

    exit_code = 2


class AccuracyError(FusionError):
    """A model less accurate than the user allows (exit code 6)."""

    exit_code = 6


class DeviceError(FusionError):
    """A device that cannot start on this machine. Another device may run the bundle."""


class SceneEvicted(FusionError):
    """A question about a scene that is no longer cached. Look at its picture again."""


class Stopped(FusionError):
    """A question that stopped before its answer was complete."""

    def __init__(self, message: str, stage: str, partial: Answer) -> None:
        super().__init__(message)
        self.stage = stage
        """Stage in which the question stopped."""
        self.partial = partial
        """What was reached: the text so far, often empty, and the timings of the stages."""


class Cancelled(Stopped):
    """A question that ``cancel()`` or ``close()`` stopped."""


class DeadlineExceeded(Stopped):
    """A question whose deadline passed."""


def printable(text: str) -> str:
    """Return ``text`` with control characters, line separators and lone surrogates escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
