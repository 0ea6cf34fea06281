"""Options of the commands that run a model."""

from __future__ import annotations

import argparse
from typing import TypedDict

from fusion_edge.runtime.backends.devices import AUTO, NAMES
from fusion_edge.runtime.cli.options import positive_integer, positive_seconds


def add_deadline_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--deadline``, in seconds."""
    parser.add_argument(
        "--deadline",
        type=positive_seconds,
        metavar="SECONDS",
        help="end each answer after this time (default: never)",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`load_options` returns."""
    add = parser.add_argument
    add("--device", choices=(AUTO, *NAMES), default=AUTO, help="device (default: the best for the bundle)")
    add(
        "--threads",
        type=positive_integer,
        metavar="N",
        help="CPU threads (default: all processors that this process may use)",
    )
    add("--spin", action="store_true", help="let idle CPU threads spin for tens of milliseconds (default: 0.1 ms)")
    add("--preload", action="store_true", help="read the weights in before the first question (default: on first use)")
    add("--lock-memory", action="store_true", help="preload the weights and lock them in memory, within ulimit -l")


class LoadOptions(TypedDict):
    """Arguments of :func:`load` that commands offer."""

    device: str
    threads: int | None
    spin: bool
    preload: bool
    lock_memory: bool


def load_options(arguments: argparse.Namespace) -> LoadOptions:
    """Return the parsed options of :func:`add_device_options`."""
    return LoadOptions(
        device=arguments.device,
        threads=arguments.threads,
        spin=arguments.spin,
        preload=arguments.preload,
        lock_memory=arguments.lock_memory,
    )
