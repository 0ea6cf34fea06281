"""YUV frames of cameras, as V4L2 and GStreamer deliver them, to RGB.

BT.601 with limited range (Y 16 to 235, U and V 16 to 240), which V4L2 and OpenCV assume, too. Pixels that share a
chroma sample get its value. Pillow converts: 2.5 times as fast as integer arithmetic in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.images.image_files import check_size

Pixels = npt.NDArray[np.uint8]

RED, BLUE = 0.299, 0.114
"""Weights of red and blue in the luma of BT.601."""


def _to_rgb() -> tuple[float, ...]:
    """Return the rows ``(Y, U, V, offset)`` of red, green and blue, for Pillow's ``convert``."""
    luma, chroma, green = 255 / 219, 255 / 112, 1 - RED - BLUE
    v_red, u_blue = chroma * (1 - RED), chroma * (1 - BLUE)
    rows = ((0.0, v_red), (-u_blue * BLUE / green, -v_red * RED / green), (u_blue, 0.0))
    return tuple(value for u, v in rows for value in (luma, u, v, -16 * luma - 128 * (u + v)))


TO_RGB = _to_rgb()


def yuv_to_rgb(array: npt.NDArray[Any], color: str) -> Image.Image:
    """Convert a frame to RGB.

    Args:
        array: ``nv12`` and ``i420``: uint8 ``[H*3/2,W]``; ``yuyv``: uint8 ``[H,W,2]``.
        color: One of :data:`YUV_COLORS`.

    Raises:
        UsageError: The array has another shape or dtype.
    """
    expected, split = _FORMATS[color]
    if array.dtype != np.uint8 or (planes := split(array)) is None:
        shape = list(array.shape)
        raise UsageError(f"The {color} frame has shape {shape} and dtype {array.dtype}; expected uint8 {expected}.")
    rows, columns = planes[0].shape
    size = (columns, rows)
    check_size(size, f"The {color} frame")
    bands = (Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.NEAREST) for plane in planes)
    return Image.merge("RGB", tuple(bands)).convert("RGB", TO_RGB)


def _nv12(array: Pixels) -> tuple[Pixels, Pixels, Pixels] | None:
    if (luma := _luma(array)) is None:
        return None
    chroma = array[len(luma) :]
    return luma, chroma[:, ::2], chroma[:, 1::2]


def _i420(array: Pixels) -> tuple[Pixels, Pixels, Pixels] | None:
    if (luma := _luma(array)) is None:
        return None
    rows, columns = len(luma) // 2, luma.shape[1] // 2
    u, v = np.ascontiguousarray(array[len(luma) :]).reshape(2, rows, columns)
    return luma, u, v


def _luma(array: Pixels) -> Pixels | None:
    """Return the upper two thirds of a frame with 12 bits a pixel; None unless height and width are even."""
    if array.ndim != 2 or len(array) % 3 or array.shape[1] % 2:
        return None
    return array[: len(array) // 3 * 2]


def _yuyv(array: Pixels) -> tuple[Pixels, Pixels, Pixels] | None:
    if array.ndim != 3 or array.shape[2] != 2 or array.shape[1] % 2:
        return None
    return array[:, :, 0], array[:, ::2, 1], array[:, 1::2, 1]


_TWELVE_BITS = "[H * 3 / 2, W] with even H and W"
_FORMATS: dict[str, tuple[str, Callable[[Pixels], tuple[Pixels, Pixels, Pixels] | None]]] = {
    "nv12": (_TWELVE_BITS, _nv12),
    "i420": (_TWELVE_BITS, _i420),
    "yuyv": ("[H, W, 2] with even W", _yuyv),
}
YUV_COLORS = tuple(_FORMATS)
