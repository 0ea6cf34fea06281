"""Entry points of the commands. They handle signals before they import libraries, because imports are slow."""

from __future__ import annotations

from fusion_edge.runtime.system.first_signals import leave_at_once


def run() -> int:
    """Run ``fusion-run`` and return the exit code."""
    return start("fusion_edge.runtime.cli.run")


def info() -> int:
    """Run ``fusion-info`` and return the exit code."""
    return start("fusion_edge.runtime.cli.info")


def serve() -> int:
    """Run ``fusion-serve`` and return the exit code."""
    libraries = ("prometheus_client", "pydantic", "starlette", "uvicorn")
    return start("fusion_edge.runtime.cli.serve", libraries, "serve")


def start(module: str, libraries: tuple[str, ...] = (), extra: str = "") -> int:
    """Import the module of a command, call its ``main`` and return the exit code.

    ``extra`` installs the ``libraries`` that the module imports.
    """
    leave_at_once()
    import sys
    from importlib import import_module
    from importlib.util import find_spec

    from fusion_edge.runtime.system import memory_limits

    if reason := memory_limits.start_error():
        sys.stderr.write(f"error: {reason}\n")
        return 1
    if missing := [library for library in libraries if find_spec(library) is None]:
        verb = "is" if len(missing) == 1 else "are"
        remedy = f"run pip install '.[{extra}]' in a clone of fusion-edge."
        sys.stderr.write(f"error: {' and '.join(missing)} {verb} not installed; {remedy}\n")
        return 1
    command = import_module(module)
    try:
        code: int = command.main()
    except SystemExit as ended:  # from argparse, after --help or a wrong option; flushing its output may fail
        from argparse import Namespace

        from fusion_edge.runtime.cli.command import run_command

        code = ended.code if isinstance(ended.code, int) else 0
        return run_command(lambda _: code, Namespace())
    return code
