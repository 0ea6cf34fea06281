"""Signals during the start of a command: they end the process at once, because there is nothing to clean up.

Entry points import this module first. It imports only modules that Python has loaded by then, and ``signal``.
"""

from __future__ import annotations

import os
import signal
import sys

MESSAGES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""Message by signal: Ctrl-C, ``kill`` or ``docker stop``, a closed terminal."""
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers of signals that the program neither handles nor ignores."""


def leave_at_once() -> None:
    """Make each signal print its message and end the process without cleanup."""
    for number in MESSAGES:
        if signal.getsignal(number) in DEFAULTS:
            signal.signal(number, leave)


def leave_while_a_module_loads() -> None:
    """Call :func:`leave_at_once` if ``python -m`` is about to run one of our modules. Packages call this first."""
    if getattr(sys, "argv", [])[:1] == ["-m"]:  # the value while Python looks for the module
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        if module.startswith("fusion_edge."):
            leave_at_once()


def leave(number: int, _frame: object) -> None:
    """Handle a signal: exit with 128 plus its number."""
    try:
        os.write(2, f"{MESSAGES[signal.Signals(number)]}\n".encode())
    finally:  # also without a terminal
        os._exit(128 + number)
