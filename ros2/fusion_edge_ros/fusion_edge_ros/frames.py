"""Pictures of image messages: ``sensor_msgs/Image`` and ``sensor_msgs/CompressedImage``. Needs no ROS."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fusion_edge import FusionError

Color = Literal["rgb", "bgr", "yuyv"]
"""Layout of an array's channels, as :meth:`fusion_edge.Asker.submit` takes it."""
COMPRESSED_FORMATS = ("JPEG", "PNG")


class Time(Protocol):
    """``builtin_interfaces/Time``."""

    sec: int
    nanosec: int


class Header(Protocol):
    """``std_msgs/Header``."""

    @property
    def stamp(self) -> Time:
        """When the camera took the picture."""
        ...

    frame_id: str


class ImageMessage(Protocol):
    """``sensor_msgs/Image``."""

    @property
    def header(self) -> Header:
        """Stamp and coordinate frame of the picture."""
        ...

    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: Any


class CompressedImageMessage(Protocol):
    """``sensor_msgs/CompressedImage``."""

    @property
    def header(self) -> Header:
        """Stamp and coordinate frame of the picture."""
        ...

    format: str
    data: Any


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture, and the header of its message."""

    picture: npt.NDArray[Any] | Image.Image
    """A view of the message's data, ``[H,W,3]``, ``[H,W,2]`` or ``[H,W]``; a compressed picture is not yet decoded."""
    color: Color
    header: Header
    received: float = field(default_factory=time.monotonic)
    """When its message came, by :func:`time.monotonic`."""

    @property
    def age(self) -> float:
        """Seconds since its message came."""
        return time.monotonic() - self.received


@dataclass(frozen=True)
class Layout:
    """How an encoding lays out a pixel."""

    channels: int
    bits: Literal[8, 16] = 8
    color: Color = "rgb"
    reverse: bool = False
    """Whether the two bytes of a pixel are swapped: UYVY, of which YUYV is made."""


LAYOUTS = {
    "mono8": Layout(1),
    "mono16": Layout(1, 16),
    "rgb8": Layout(3),
    "rgb16": Layout(3, 16),
    "rgba8": Layout(4),
    "rgba16": Layout(4, 16),
    "bgr8": Layout(3, color="bgr"),
    "bgr16": Layout(3, 16, color="bgr"),
    "bgra8": Layout(4, color="bgr"),
    "bgra16": Layout(4, 16, color="bgr"),
    "yuyv": Layout(2, color="yuyv"),
    "yuv422_yuy2": Layout(2, color="yuyv"),
    "uyvy": Layout(2, color="yuyv", reverse=True),
    "yuv422": Layout(2, color="yuyv", reverse=True),
}
"""By encoding, as ``sensor_msgs/image_encodings.hpp`` names them."""


def raw_frame(message: ImageMessage) -> Frame:
    """Return the frame of a ``sensor_msgs/Image``. 8-bit data is not copied.

    Raises:
        FusionError: The encoding is not one of :data:`LAYOUTS`, or size, step and data do not fit together.
    """
    layout = LAYOUTS.get(message.encoding)
    if layout is None:
        raise FusionError(f"The image has the encoding {message.encoding!r}; expected one of {', '.join(LAYOUTS)}.")
    height, width, step = message.height, message.width, message.step
    if height < 1 or width < 1:
        raise FusionError(f"The image has {width} x {height} pixels; expected at least one.")
    pixel = layout.channels * layout.bits // 8
    if step < width * pixel:
        raise FusionError(
            f"The image has a step of {step} bytes; {width} pixels of {message.encoding} need {width * pixel}."
        )
    if len(message.data) != step * height:
        raise FusionError(
            f"The image has {len(message.data)} bytes; {height} rows of {step} bytes are {step * height}."
        )
    order = ">" if message.is_bigendian else "<"
    pixels: npt.NDArray[Any] = np.ndarray(
        (height, width, layout.channels),
        np.dtype(f"{order}u{layout.bits // 8}"),
        message.data,
        strides=(step, pixel, layout.bits // 8),
    )
    if layout.channels == 1:
        pixels = pixels[:, :, 0]
    elif layout.channels == 4:  # alpha says nothing about a camera's picture
        pixels = pixels[:, :, :3]
    elif layout.reverse:
        pixels = pixels[:, :, ::-1]
    return Frame(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), layout.color, message.header)


def compressed_frame(message: CompressedImageMessage) -> Frame:
    """Return the frame of a ``sensor_msgs/CompressedImage``, JPEG or PNG. The model's thread decodes it later.

    Raises:
        FusionError: The data is of another format, or is damaged at its start.
    """
    expected = f"expected {' or '.join(COMPRESSED_FORMATS)}"
    if "compressedDepth" in message.format:  # a PNG behind a header of its own
        raise FusionError(f"The compressed image has the format {message.format!r}; {expected}.")
    try:
        picture = Image.open(io.BytesIO(bytes(message.data)), formats=COMPRESSED_FORMATS)
    except UnidentifiedImageError:
        raise FusionError(
            f"The compressed image has {len(message.data)} unreadable bytes of format {message.format!r}; {expected}."
        ) from None
    except Exception as error:  # Pillow's parsers raise errors of many types for damaged files
        raise FusionError(f"The compressed image is damaged ({type(error).__name__}: {error}); {expected}.") from None
    return Frame(picture, "rgb", message.header)
