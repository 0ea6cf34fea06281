"""Pictures of image messages."""

from __future__ import annotations

import io
import re
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fusion_edge_ros.frames import LAYOUTS, compressed_frame, raw_frame
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ros2.messages import CompressedImageMessage, ImageMessage

from fusion_edge import FusionError
from fusion_edge.runtime.images.preprocessing import load_image

RGB_PLACES = {"mono": (0, 0, 0), "rgb": (0, 1, 2), "bgr": (2, 1, 0)}
"""Where a pixel has red, green and blue, by the start of the encoding."""


def message_of(pixels: npt.NDArray[Any], encoding: str, padding: int = 0, is_bigendian: bool = False) -> ImageMessage:
    """A message with pixels ``[H,W,channels]`` of 8 or 16 bits, and ``padding`` bytes behind each row."""
    ordered = pixels.astype(pixels.dtype.newbyteorder(">" if is_bigendian else "<"))
    rows = [row.tobytes() + bytes([171] * padding) for row in ordered]
    data = array("B", b"".join(rows))
    return ImageMessage(len(pixels), pixels.shape[1], encoding, len(rows[0]), data, int(is_bigendian))


@given(data=st.data())
def test_raw_frames(data: st.DataObject) -> None:
    encoding = data.draw(
        st.sampled_from([name for name in LAYOUTS if name[:3] in ("rgb", "bgr") or name[:4] == "mono"])
    )
    layout = LAYOUTS[encoding]
    shape = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), layout.channels)
    dtype = np.uint8 if layout.bits == 8 else np.uint16
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = generator.integers(0, 1 << layout.bits, shape).astype(dtype)
    is_bigendian = data.draw(st.booleans())
    frame = raw_frame(message_of(pixels, encoding, data.draw(st.integers(0, 3)), is_bigendian))
    assert isinstance(frame.picture, np.ndarray)
    places = RGB_PLACES["mono" if encoding.startswith("mono") else encoding[:3]]
    rgb = np.stack([pixels[:, :, place] for place in places], axis=2)
    # The model's own reading of the same pixels, laid out as it likes them.
    np.testing.assert_array_equal(np.asarray(load_image(frame.picture, frame.color)), np.asarray(load_image(rgb)))


@pytest.mark.parametrize(("encoding", "order"), [("yuyv", 1), ("yuv422_yuy2", 1), ("uyvy", -1), ("yuv422", -1)])
def test_yuv_frames(encoding: str, order: int) -> None:
    yuyv = np.random.default_rng(0).integers(0, 256, (4, 6, 2)).astype(np.uint8)
    frame = raw_frame(message_of(yuyv[:, :, ::order], encoding, padding=2))
    assert frame.color == "yuyv"
    np.testing.assert_array_equal(frame.picture, yuyv)


def test_a_frame_is_a_view() -> None:
    message = message_of(np.zeros((2, 3, 3), np.uint8), "rgb8")
    frame = raw_frame(message)
    message.data[0] = 7  # type: ignore[index]
    assert isinstance(frame.picture, np.ndarray)
    assert frame.picture[0, 0, 0] == 7
    assert frame.header is message.header


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"encoding": "8UC3"}, "The image has the encoding '8UC3'; expected one of mono8, mono16, rgb8"),
        ({"width": 0}, "The image has 0 x 2 pixels; expected at least one."),
        ({"step": 8}, "The image has a step of 8 bytes; 3 pixels of rgb8 need 9."),
        ({"step": 10}, "The image has 18 bytes; 2 rows of 10 bytes are 20."),
        ({"data": b""}, "The image has 0 bytes; 2 rows of 9 bytes are 18."),
    ],
)
def test_refused_frames(changes: dict[str, Any], error: str) -> None:
    message = message_of(np.zeros((2, 3, 3), np.uint8), "rgb8")
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(FusionError, match=re.escape(error)):
        raw_frame(message)


def compressed(picture: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["jpeg", "png"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_compressed_frames(form: str, mode: str) -> None:
    picture = Image.effect_mandelbrot((32, 24), (-2, -1.5, 1, 1.5), 50).convert(mode)
    data = compressed(picture, form)
    frame = compressed_frame(CompressedImageMessage(f"rgb8; {form} compressed bgr8", array("B", data)))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(frame.picture, frame.color)), expected)


@pytest.mark.parametrize(
    ("form", "data", "error"),
    [
        ("gif", compressed(Image.new("RGB", (2, 2)), "gif"), "unreadable bytes of format 'gif'; expected JPEG or PNG."),
        ("jpeg", b"", "The compressed image has 0 unreadable bytes"),
        ("16UC1; compressedDepth png", b"", "has the format '16UC1; compressedDepth png'; expected JPEG or PNG."),
        ("png", compressed(Image.new("RGB", (2, 2)), "png")[:20], "expected JPEG or PNG."),
    ],
)
def test_refused_compressed_frames(form: str, data: bytes, error: str) -> None:
    with pytest.raises(FusionError, match=re.escape(error)):
        compressed_frame(CompressedImageMessage(form, data))


def test_a_large_picture() -> None:
    data = bytearray(compressed(Image.new("L", (1, 1)), "png"))
    data[16:24] = (50000).to_bytes(4, "big") * 2  # width and height of the header, whose checksum is not read before
    with pytest.raises(FusionError):
        load_image(compressed_frame(CompressedImageMessage("png", bytes(data))).picture)
