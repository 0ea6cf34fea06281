"""Run a command: errors, signals, standard streams and the exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system import signals
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory


def run_command(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command and return the exit code: 0, 1 for a failure, 2 for wrong usage, 128 + N for signal N.

    A user's mistake prints one line on standard error, never a traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until exit)
    if isinstance(sys.stdout, io.TextIOWrapper):  # for characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:  # warnings of libraries are for developers
        warnings.simplefilter("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        with signals.raising():
            code = command(arguments)
            sys.stdout.flush()
            return code
    except FusionError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, signals.Terminated) as ended:
        return signals.report(ended)
    except BrokenPipeError:
        # The reader has left (``| head``). Without this the interpreter would fail again at exit.
        _discard_output()
        return 0
    except (MemoryError, OSError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            return _fail(f"{not_enough_memory('continue')}; close other programs, or export a smaller bundle.")
        if error.filename is None:  # perhaps standard output, which would fail again at exit
            _discard_output()
        name = error.filename or "a file or standard output"
        return _fail(f"Cannot access {name}: {error.strerror}; check the path, its permissions and the disk.")


def _fail(message: str, code: int = 1) -> int:
    with suppress(OSError):  # the reader may have left
        sys.stderr.write(f"error: {' '.join(message.splitlines())}\n")
    return code


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
