"""Signals that end a command: what it began is cleaned up, one line says so, the exit code is 128 plus the number.

Only commands take signals. In a program that uses fusion-edge as a library they stay as that program has them.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from fusion_edge.runtime.system.first_signals import DEFAULTS, WORDS, leave


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came; :class:`KeyboardInterrupt` is its like for SIGINT."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.number = number


class _Held:
    """Whether signals wait, and the one that does."""

    depth = 0
    waiting: signal.Signals | None = None


@contextmanager
def raising() -> Iterator[None]:
    """While it lasts, a signal raises :class:`KeyboardInterrupt` or :class:`Terminated`; further ones are ignored.

    So cleaning up is not interrupted. A signal that is ignored (``nohup``) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in WORDS}
    rearm()
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) in _OURS:
                signal.signal(number, handler)


def rearm() -> None:
    """Within :func:`raising`, take signals again after one that did not end the command."""
    _take(_raise)


@contextmanager
def held() -> Iterator[None]:
    """Have signals wait until its end: for what must not be left half done."""
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
        if not _Held.depth and _Held.waiting is not None:
            number, _Held.waiting = _Held.waiting, None
            _raise(number, None)


def tell(ended: KeyboardInterrupt | Terminated) -> int:
    """Say what ended the command; the exit code."""
    number = ended.number if isinstance(ended, Terminated) else signal.SIGINT
    with suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"{WORDS[number]}\n")
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
    """Not SIG_IGN, which processes that are started meanwhile would inherit."""


def _take(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the signals that nobody else handles or ignores."""
    for number in WORDS:
        if signal.getsignal(number) in _OURS:
            signal.signal(number, handler)


_OURS = (*DEFAULTS, leave, _raise, _ignore)
