"""Entry points of the commands: signals are taken first, for imports take as long as a user takes to press Ctrl-C.

Nothing here imports a library.
"""

from __future__ import annotations

from fusion_edge.runtime.system.first_signals import leave_at_once


def run() -> int:
    """``fusion-run``; the exit code."""
    return start("fusion_edge.runtime.run_command")


def info() -> int:
    """``fusion-info``; the exit code."""
    return start("fusion_edge.runtime.cli.info")


def start(module: str) -> int:
    """Import a command's module and call its ``main``; the exit code."""
    leave_at_once()
    import sys
    from importlib import import_module

    from fusion_edge.runtime.system import memory_limits

    if reason := memory_limits.too_little():
        sys.stderr.write(f"error: {reason}\n")
        return 1
    command = import_module(module)
    try:
        code: int = command.main()
    except SystemExit as ended:  # by argparse, after --help or a wrong option; what it wrote may not go out
        from argparse import Namespace

        from fusion_edge.runtime.cli.command import run_command

        asked = ended.code if isinstance(ended.code, int) else 0
        return run_command(lambda _: asked, Namespace())
    return code
