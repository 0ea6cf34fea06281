"""What every command line tool of fusion-edge shares."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system import signals
from fusion_edge.runtime.system.output_file import check_output_file
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory

UNITS = {"": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
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


def output_file(text: str) -> Path:
    """argparse type of a file to write: refused before there is anything to write if it cannot be."""
    try:
        check_output_file(Path(text))
    except FusionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def numbers(text: str) -> tuple[int, ...]:
    """argparse type of a comma list of positive integers."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma list of positive integers such as 16,144")
    return values


def positive(text: str) -> int:
    """argparse type of a positive integer."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def byte_count(text: str) -> int:
    """argparse type of a size such as ``8GB``, ``7.4GiB`` or ``500000``, in bytes."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 7.4GiB")
    return int(float(match[1]) * units[match[2].lower()])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines) + "\n"


def size(count: float) -> str:
    """Bytes for people, decimal units: ``2.61 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"
