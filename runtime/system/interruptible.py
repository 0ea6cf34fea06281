"""Long C++ work that Ctrl-C ends.

Python runs signal handlers only in the main thread, between its own instructions. So the work runs in another thread.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

GRACE_SECONDS = 0.5
POLL_SECONDS = 0.2
Result = TypeVar("Result")

_abandoned: list[Future[Any]] = []


def interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Run ``work`` in a thread and return its result, while this thread handles signals.

    An exception that ends the wait, such as Ctrl-C's, calls ``cancel`` and gives the work :data:`GRACE_SECONDS` to end.
    Work that takes longer is abandoned: nothing can stop a thread.
    """
    outcome: Future[Result] = Future()
    try:
        Thread(target=_settle, args=(outcome, work), daemon=True).start()
        while not wait([outcome], POLL_SECONDS).done:  # a signal right before an endless wait would not end it
            pass
        return outcome.result()
    except BaseException:
        cancel()
        _abandoned.append(outcome)
        wait([outcome], GRACE_SECONDS)
        raise


def is_abandoned() -> bool:
    """Return whether abandoned work still runs."""
    return not all(outcome.done() for outcome in _abandoned)


def leave_abandoned(code: int) -> int:
    """Return a command's exit code, or end the process with it: a normal exit would wait for abandoned work."""
    if is_abandoned():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the terminal may be closed
                stream.flush()
        os._exit(code)
    return code


def _settle(outcome: Future[Result], work: Callable[[], Result]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)
