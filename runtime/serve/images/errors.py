"""Why a picture of a request is refused."""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """The ``code`` of the error, for programs."""

    INVALID_URL = "invalid_image_url"
    """A URL that cannot be parsed."""
    NOT_ALLOWED = "image_url_not_allowed"
    """A URL that the server does not open."""
    UNREACHABLE = "image_unreachable"
    """A picture that its host does not deliver."""
    TOO_LARGE = "image_too_large"
    """Too many bytes or pixels."""
    INVALID_IMAGE = "invalid_image"
    """Bytes that are no picture."""


class ImageError(Exception):
    """A picture that is refused."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        """One line: what is wrong, what was expected, the remedy."""
