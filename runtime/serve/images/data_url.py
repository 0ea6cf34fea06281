"""``data:`` URLs of pictures, RFC 2397 in base64 only. They are bytes, as they are in a request's body."""

from __future__ import annotations

import base64
import binascii
import io
import re

from fusion_edge.runtime.serve.images.errors import ImageError, Reason

MEDIA_TYPES = (
    *("image/bmp", "image/gif", "image/jpeg", "image/jpg", "image/png", "image/tiff", "image/webp"),
    *("image/x-portable-anymap", "image/x-portable-bitmap", "image/x-portable-graymap", "image/x-portable-pixmap"),
)
"""Media types of the formats that are decoded. The bytes decide which of them a picture has."""

_HEAD = re.compile(rb"data:([^;,]{1,64});base64,", re.IGNORECASE)
_HEAD_BYTES = 80
_BLOCK = 256 << 10  # other threads wait for the decoder: a fraction of a millisecond


def base64_length(size: int) -> int:
    """Return the characters of base64 for ``size`` bytes, padding included."""
    return 4 * ((size + 2) // 3)


def decode_data_url(url: bytes | memoryview, max_bytes: int) -> bytes:
    """Return the bytes of a ``data:`` URL. Raises :class:`ImageError`, for too many bytes before it decodes any."""
    head = _HEAD.match(bytes(url[:_HEAD_BYTES]))
    if head is None:
        raise ImageError(
            Reason.INVALID_URL,
            "The data URL has a wrong head; expected data:image/png;base64, followed by the picture.",
        )
    if head[1].lower().decode("latin-1") not in MEDIA_TYPES:
        raise ImageError(
            Reason.INVALID_URL, f"The data URL has an unsupported media type; expected {', '.join(MEDIA_TYPES)}."
        )
    length = len(url) - head.end()
    if length > base64_length(max_bytes):
        raise ImageError(
            Reason.TOO_LARGE, f"The picture has more than {max_bytes} bytes, the limit; scale it down first."
        )
    data = _decode(memoryview(url)[head.end() :])
    if len(data) > max_bytes:
        raise ImageError(
            Reason.TOO_LARGE, f"The picture has {len(data)} bytes, more than the limit of {max_bytes}; scale it down."
        )
    return data


def _decode(text: memoryview) -> bytes:
    if len(text) % 4 or not text:
        raise ImageError(
            Reason.INVALID_URL,
            f"The data URL has {len(text)} characters of base64; expected a multiple of 4, padded with =.",
        )
    decoded = io.BytesIO()
    try:
        for begin in range(0, len(text), _BLOCK):
            block = text[begin : begin + _BLOCK]
            size = decoded.write(base64.b64decode(block, validate=True))
            if begin + _BLOCK < len(text) and size != _BLOCK // 4 * 3:
                raise binascii.Error("padding before the end")
        return decoded.getvalue()
    except binascii.Error:
        raise ImageError(
            Reason.INVALID_URL, "The data URL is not base64 (A-Z, a-z, 0-9, +, /, and = at the end); encode it again."
        ) from None
