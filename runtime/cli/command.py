"""What every command line tool of fusion-edge shares."""

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
    """Run a command; the exit code: 0, 1 for a failure, 2 for wrong usage, 128 + N if signal N ended it.

    A user's mistake is one line on standard error, never a traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may have characters that a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:  # of libraries, to developers: what matters to a user is said by an error of ours
        warnings.simplefilter("ignore")
    try:
        with signals.raising():
            code = command(arguments)
            sys.stdout.flush()
            return code
    except FusionError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, signals.Terminated) as ended:
        return signals.tell(ended)
    except BrokenPipeError:
        # The reader went away (``| head``): nothing is left to say, also at interpreter exit.
        _discard_output()
        return 0
    except (MemoryError, OSError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            return _fail(f"{not_enough_memory('go on')}; close other programs, or export a smaller bundle.")
        if error.filename is None:  # perhaps from standard output, whose rest would fail again at interpreter exit
            _discard_output()
        name = error.filename or "a file or standard output"
        return _fail(f"Cannot access {name}: {error.strerror}; check the path, its permissions and the disk.")


def _fail(message: str, code: int = 1) -> int:
    with suppress(OSError):  # whoever read it may be gone
        sys.stderr.write(f"error: {' '.join(message.splitlines())}\n")
    return code


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
