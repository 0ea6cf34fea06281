"""Signals that come before a command has begun: the process ends at once, for there is nothing to clean up.

Entry points import this first, so it imports nothing that Python has not loaded by then but ``signal``.
"""

from __future__ import annotations

import os
import signal
import sys

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""What a command says, by the signal that ends it: Ctrl-C, ``kill`` or ``docker stop``, a closed terminal."""
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers of signals that nobody handles or ignores."""


def leave_at_once() -> None:
    """Have those signals say their word and end the process without any cleaning up."""
    for number in WORDS:
        if signal.getsignal(number) in DEFAULTS:
            signal.signal(number, leave)


def leave_while_a_module_loads() -> None:
    """:func:`leave_at_once` if Python is about to run one of our modules (``python -m``); packages call it first."""
    if getattr(sys, "argv", [])[:1] == ["-m"]:  # so Python has it until it has found the module
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        if module.startswith("fusion_edge."):
            leave_at_once()


def leave(number: int, _frame: object) -> None:
    """The handler: the exit code is 128 plus the signal's number."""
    try:
        os.write(2, f"{WORDS[signal.Signals(number)]}\n".encode())
    finally:  # also if the terminal is gone
        os._exit(128 + number)
