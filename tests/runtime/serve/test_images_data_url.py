"""data: URLs of pictures."""

from __future__ import annotations

import base64
import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.runtime.serve.images.data_url import MEDIA_TYPES, decode_data_url
from fusion_edge.runtime.serve.images.errors import ImageError, Reason

LIMIT = 1000


def refused(url: str) -> Reason:
    with pytest.raises(ImageError) as caught:
        decode_data_url(url.encode("utf-8", "replace"), LIMIT)
    assert "\n" not in caught.value.message
    return caught.value.reason


@given(st.binary(min_size=1, max_size=LIMIT), st.sampled_from(MEDIA_TYPES), st.booleans())
def test_bytes_come_back(data: bytes, media_type: str, upper: bool) -> None:
    head = f"data:{media_type};base64,"
    url = (head.upper() if upper else head).encode() + base64.b64encode(data)
    assert decode_data_url(url, LIMIT) == decode_data_url(memoryview(url), LIMIT) == data


@given(st.text(max_size=200))
def test_any_text_is_data_or_refused(text: str) -> None:
    with suppress(ImageError):
        data = decode_data_url(f"data:image/png;base64,{text}".encode("utf-8", "replace"), LIMIT)
        assert len(data) * 4 // 3 <= len(text) <= (len(data) + 2) * 4 // 3
        assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


@given(st.text(max_size=100))
def test_any_head_is_refused(text: str) -> None:
    assert refused(f"data:{text}") is Reason.INVALID_URL


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;charset=utf-8;base64,AAAA",
        "data:;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        "data:application/postscript;base64,AAAA",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AAA=AAAA",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AA%3D",
        "data:image/png;base64,AAA\n",
        "data:image/png;base64, AAA",
        "data:image/png;base64,ÄÄÄÄ",
        "data:image/png;base64,====",
    ],
)
def test_other_forms_are_refused(url: str) -> None:
    assert refused(url) is Reason.INVALID_URL


def test_the_limit_is_exact() -> None:
    head = "data:image/png;base64,"
    assert len(decode_data_url((head + base64.b64encode(bytes(LIMIT)).decode()).encode(), LIMIT)) == LIMIT
    assert refused(head + base64.b64encode(bytes(LIMIT + 1)).decode()) is Reason.TOO_LARGE
    assert refused(head + "!" * (2 * LIMIT)) is Reason.TOO_LARGE  # before it is decoded


@pytest.mark.parametrize("size", [(256 << 10) - 4, 256 << 10, (256 << 10) + 4, 800_000])
def test_long_urls_are_decoded_block_by_block(size: int) -> None:
    text = base64.b64encode(os.urandom(size // 4 * 3))
    head = b"data:image/png;base64,"
    assert decode_data_url(head + text, size) == base64.b64decode(text)
    for place in (4, (256 << 10) - 4, len(text) - 8):  # padding before the end, also at the end of a block
        with pytest.raises(ImageError):
            decode_data_url(head + text[:place] + b"AAA=" + text[place + 4 :] + b"AAAA", size)
