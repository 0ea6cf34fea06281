"""argparse types that the commands share."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.output_file import check_output_file

UNITS = {"": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def output_file(text: str) -> Path:
    """Parse the path of an output file, which must be writable."""
    try:
        check_output_file(Path(text))
    except FusionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def integer_list(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of positive integers."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of positive integers such as 16,144")
    return values


def positive_integer(text: str) -> int:
    """Parse a positive integer."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def positive_seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    return _positive_time(text, "seconds")


def positive_minutes(text: str) -> float:
    """Parse a positive number of minutes."""
    return _positive_time(text, "minutes")


def _positive_time(text: str, unit: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not (math.isfinite(time) and time > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of {unit}")
    return time


def byte_count(text: str) -> int:
    """Parse a size such as ``8GB``, ``7.4GiB`` or ``500000``; return bytes."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 7.4GiB")
    return int(float(match[1]) * units[match[2].lower()])


def port_number(text: str) -> int:
    """Parse a TCP port, from 0 (any free one) to 65535."""
    if not text.isascii() or not text.isdigit() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)
