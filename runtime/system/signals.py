"""Signals that end a command: it cleans up, prints one line and exits with 128 plus the signal's number.

Only commands handle signals. A program that uses fusion-edge as a library keeps its own handlers.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from fusion_edge.runtime.system.first_signals import DEFAULTS, MESSAGES, leave


class Terminated(SystemExit):
    """Raised by SIGTERM and SIGHUP, as :class:`KeyboardInterrupt` by SIGINT."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.number = number


class _Held:
    """Depth of :func:`held` blocks, and the signal that waits for their end."""

    depth = 0
    waiting: signal.Signals | None = None


@contextmanager
def raising() -> Iterator[None]:
    """Make the first signal raise :class:`KeyboardInterrupt` or :class:`Terminated`, and ignore later ones.

    Nothing interrupts the cleanup. An ignored signal (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in MESSAGES}
    rearm()
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) in _OURS:
                signal.signal(number, handler)


def rearm() -> None:
    """Handle signals again after one that did not end the command. Call it within :func:`raising`."""
    _take(_raise)


@contextmanager
def held() -> Iterator[None]:
    """Delay signals to the end of the block, which must not be left incomplete."""
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
        if not _Held.depth and _Held.waiting is not None:
            number, _Held.waiting = _Held.waiting, None
            _raise(number, None)


def report(ended: KeyboardInterrupt | Terminated) -> int:
    """Print what ended the command and return the exit code."""
    number = ended.number if isinstance(ended, Terminated) else signal.SIGINT
    with suppress(OSError):  # the terminal may be closed
        sys.stderr.write(f"{MESSAGES[number]}\n")
    return 128 + number


def _raise(number: int, _frame: FrameType | None) -> None:
    if _Held.depth:
        _Held.waiting = signal.Signals(number)
        return
    _take(_ignore)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(signal.Signals(number))


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Child processes would inherit SIG_IGN, but do not inherit this."""


def _take(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the signals that the program neither handles nor ignores."""
    for number in MESSAGES:
        if signal.getsignal(number) in _OURS:
            signal.signal(number, handler)


_OURS = (*DEFAULTS, leave, _raise, _ignore)
