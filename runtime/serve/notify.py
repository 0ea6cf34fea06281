"""Tell systemd how the server does: sd_notify(3)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

_LOGGER = logging.getLogger("fusion_edge")


def notify(*assignments: str) -> None:
    """Send assignments such as ``READY=1``; do nothing unless systemd started this process with ``Type=notify``.

    Never waits, and a failure is only logged: the server works, and drains, without systemd as well.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)  # nobody may read the other end
            channel.connect("\0" + address[1:] if address[0] == "@" else address)  # "@" means an abstract socket
            channel.sendall("\n".join(assignments).encode())
    except OSError as error:
        reason = error.strerror or str(error)
        _LOGGER.warning("NOTIFY_SOCKET does not take %s (%s); the server goes on.", " ".join(assignments), reason)


def watchdog_seconds() -> float | None:
    """Return the seconds of silence after which systemd ends this process; ``None`` without a watchdog."""
    microseconds, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) == 0 or (process and process != str(os.getpid())):
        return None
    return int(microseconds) / 1e6


async def feed_watchdog() -> None:
    """Tell systemd twice within its time that the event loop runs, until cancelled. Returns without a watchdog."""
    seconds = watchdog_seconds()
    while seconds is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 2)
