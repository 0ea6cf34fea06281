"""The HTTP server of one process: a socket, signals and a graceful end."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.serve.engine import Engine
from fusion_edge.runtime.serve.limits import RequestLimits
from fusion_edge.runtime.serve.notify import feed_watchdog, notify
from fusion_edge.runtime.serve.protocol import uvicorn_options
from fusion_edge.runtime.system.first_signals import MESSAGES, leave

KEEP_ALIVE_SECONDS = 5
"""Seconds that an idle connection stays open."""
BACKLOG = 128
"""Connections that wait until the process takes them."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Port 0 is any free one.

    Raises :class:`UsageError` for a host that is no address of this machine, :class:`FusionError` if the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host {host} is no address of this machine ({error.strerror}); try 127.0.0.1.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise FusionError(f"Port {port} of {host} is in use; stop the other program, or pass --port.") from None
        if error.errno == errno.EACCES:
            raise FusionError(f"This user may not listen on port {port}; pass --port with 1024 or more.") from None
        raise UsageError(f"--host {host} is no address of this machine ({os.strerror(error.errno or 0)}).") from None
    return listener


def serve(
    app: Starlette,
    listener: socket.socket,
    limits: RequestLimits,
    drain_seconds: float,
    when_ready: Callable[[], object],
) -> None:
    """Serve an application until a signal ends it, and call ``when_ready`` once its model is loaded.

    The first SIGINT, SIGTERM or SIGHUP drains: requests that run or wait finish, new ones are refused. A second one, or
    one while the model loads, ends the process at once.

    Raises :class:`FusionError` if the model does not load.
    """
    server = Server(app, limits, drain_seconds, when_ready)
    server.run([listener])
    if server.error is not None:
        raise server.error


class Server(uvicorn.Server):
    """uvicorn's server with a drain before its shutdown."""

    def __init__(
        self, app: Starlette, limits: RequestLimits, drain_seconds: float, when_ready: Callable[[], object]
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            lifespan="on",
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            **uvicorn_options(limits),
        )
        super().__init__(config)
        self._app = app
        self._drain_seconds = drain_seconds
        self._when_ready = when_ready
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = False
        self.error: BaseException | None = None
        """Why the model did not load."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve, while the model loads."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._tasks += [asyncio.create_task(self._report()), asyncio.create_task(feed_watchdog())]

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals that are not ignored (``nohup``), and do not raise them again: a drain is a success."""
        is_main = threading.current_thread() is threading.main_thread()  # only there are signals handled
        numbers = [number for number in MESSAGES if is_main and signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain. End at once at the second signal, and while the model loads: its thread cannot be interrupted."""
        if not self.started or self._is_draining or self._engine.state == "loading":
            leave(sig, frame)
        else:
            self._is_draining = True
            self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.create_task(self._drain())))

    @property
    def _engine(self) -> Engine:
        engine: Engine = self._app.state.engine
        return engine

    async def _report(self) -> None:
        loaded = self._engine.loaded
        await asyncio.wait([loaded])
        self.error = loaded.exception()
        if self.error is not None:
            self.should_exit = True
        else:
            notify("READY=1")
            self._when_ready()

    async def _drain(self) -> None:
        notify("STOPPING=1")
        try:
            await self._engine.drain(self._drain_seconds)
        finally:
            self.should_exit = True
