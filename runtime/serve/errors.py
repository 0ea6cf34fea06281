"""Errors of the HTTP interface, in OpenAI's form: https://platform.openai.com/docs/guides/error-codes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class ApiError(Exception):
    """An error that the client gets as ``{"error": {"message", "type", "param", "code"}}``."""

    status: int
    """HTTP status code, 400 to 599."""
    message: str
    """One line: what is wrong, what was expected, the remedy. Nothing of another client's request."""
    param: str | None = None
    """The field at fault, as a path: ``messages[0].content``."""
    code: str | None = None
    """Short name of the error for programs, such as ``queue_full``."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the response, such as ``Retry-After``. ``X-Request-Id`` is always one of them."""

    def __post_init__(self) -> None:
        self.headers = {"X-Request-Id": f"req-{uuid.uuid4().hex}", **self.headers}

    def body(self) -> dict[str, Any]:
        """Return the response's JSON object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
