"""Logs of a server that contain nothing of a request.

Our own messages and uvicorn's are written so. Those of other libraries and of exceptions may quote what
they were given.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback

QUIET_LOGGERS = ("fusion_edge", "uvicorn.error")
"""Loggers whose messages contain nothing of a request."""


def configure() -> None:
    """Log warnings and errors to standard error.

    Records of other loggers than :data:`QUIET_LOGGERS` are reduced to the place in the code; exceptions, to types and
    places, also those that end a thread. Python's warnings are not written: Pillow's quote values of damaged files.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ContentFreeFormatter(_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    threading.excepthook = lambda failed: _log("A thread failed.", failed.exc_value)
    sys.unraisablehook = lambda failed: _log("An exception was ignored.", failed.exc_value)


def _log(message: str, error: BaseException | None) -> None:
    if error is not None and not isinstance(error, SystemExit):
        logging.getLogger(QUIET_LOGGERS[0]).error(message, exc_info=error)


_FORMAT = "%(levelname)s %(name)s: %(message)s"


class ContentFreeFormatter(logging.Formatter):
    """Formats a record without anything that a request could have put there."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        bare = logging.makeLogRecord(record.__dict__ | {"exc_text": None, "stack_info": None})
        if not record.name.startswith(QUIET_LOGGERS):
            bare.msg, bare.args = f"message at {record.pathname}:{record.lineno}", None
        return super().format(bare)

    def formatException(self, ei: object) -> str:
        """Return types and places of an exception and its causes, without their messages."""
        error = ei[1] if isinstance(ei, tuple) else None
        lines: list[str] = []
        while isinstance(error, BaseException) and len(lines) < 100:
            places = traceback.extract_tb(error.__traceback__)
            lines += [type(error).__name__, *(f"  {at.filename}:{at.lineno} in {at.name}" for at in places)]
            error = error.__cause__ or error.__context__
        return "\n".join(lines)
