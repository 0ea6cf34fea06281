"""The URL of a request's picture: the largest part of a body, and the first that is dropped."""

from __future__ import annotations

import hashlib

from fusion_edge.runtime.serve.errors import ApiError

PLACEHOLDER = "data:cut"
"""What stands for the URL in the JSON that it was cut from."""

_WHOLE_BYTES = 2 << 20
_BESIDES_BYTES = 1 << 20  # less than half of the bodies that are cut, so the URL is at their middle
_KEY = b'"url"'


class PictureUrl:
    """A URL until the picture is read: a ``data:`` URL may have 16 MiB, and the answer may take minutes."""

    def __init__(self, content: str | bytes | memoryview) -> None:
        self._content: bytes | memoryview = content.encode("utf-8", "replace") if isinstance(content, str) else content

    def __len__(self) -> int:
        """Return the bytes of the URL; 0 once it is taken."""
        return len(self._content)

    @property
    def is_data(self) -> bool:
        """Whether the URL has the scheme ``data``."""
        return bytes(self._content[:5]).lower() == b"data:"

    @property
    def is_https(self) -> bool:
        """Whether the URL has the scheme ``https``."""
        return bytes(self._content[:6]).lower() == b"https:"

    def digest(self) -> str:
        """Return the SHA-256 of the URL, in hexadecimal."""
        return hashlib.sha256(self._content).hexdigest()

    def text(self) -> str:
        """Return the URL as text."""
        return bytes(self._content).decode("utf-8", "replace")

    def take(self) -> bytes | memoryview:
        """Return the URL, and drop it."""
        content, self._content = self._content, b""
        return content


def cut_url(body: bytes) -> tuple[bytes, PictureUrl | None]:
    """Cut the ``data:`` URL of the picture out of a JSON text, so that it is neither decoded nor copied as JSON.

    Returns the rest, with :data:`PLACEHOLDER` as the URL, and the URL; or the body and None, if it is small. Raises
    :class:`ApiError` with status 413 for a large body with more than 1 MiB besides the URL.
    """
    if len(body) <= _WHOLE_BYTES:
        return body, None
    # The string at the middle. A quote before ``data:`` that follows a colon begins a string, so it is a whole one.
    middle = len(body) // 2
    begin, end = body.rfind(b'"', 0, middle) + 1, body.find(b'"', middle)
    before = body[max(0, begin - 65) : max(0, begin - 1)].rstrip(b" \t\r\n")
    is_url = before.endswith(b":") and before[:-1].rstrip(b" \t\r\n").endswith(_KEY) and end > begin
    if not is_url or body[begin : begin + 5].lower() != b"data:" or len(body) - (end - begin) > _BESIDES_BYTES:
        raise besides_too_large()
    url: bytes | memoryview = memoryview(body)[begin:end]
    if body.find(b"\\", begin, end) >= 0:  # some encoders escape base64's signs
        url = body[begin:end].replace(b"\\/", b"/").replace(b"\\u002B", b"+").replace(b"\\u002b", b"+")
    return b"%b%b%b" % (body[:begin], PLACEHOLDER.encode(), body[end:]), PictureUrl(url)


def besides_too_large() -> ApiError:
    """Return the error of a large body that is not a picture for the most part."""
    message = (
        f"The body has more than {_BESIDES_BYTES} bytes besides a picture's data URL; send one picture, and less text."
    )
    return ApiError(413, message, code="request_too_large")
