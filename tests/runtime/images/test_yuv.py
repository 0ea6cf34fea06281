"""YUV frames against the formulas of BT.601 in float64, for every layout, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.preprocessing import Color, load_image
from fusion_edge.runtime.images.yuv import YUV_COLORS

Bytes = npt.NDArray[np.uint8]
FLOAT32_ERROR = 1e-4
"""Pillow sums four products below 600 in float32."""


def reference(y: Bytes, u: Bytes, v: Bytes) -> npt.NDArray[np.float64]:
    """RGB ``[H,W,3]`` before rounding, from planes ``[H,W]``: limited range to 0 to 1, then BT.601."""
    luma = (y - 16.0) / 219
    blue = luma + 2 * (1 - 0.114) * (u - 128.0) / 224
    red = luma + 2 * (1 - 0.299) * (v - 128.0) / 224
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return 255 * np.clip(np.stack([red, green, blue], axis=-1), 0, 1)


def frames(y: Bytes, u: Bytes, v: Bytes) -> dict[Color, tuple[Bytes, npt.NDArray[np.float64]]]:
    """Frames of planes ``y`` ``[H,W]`` and ``u``, ``v`` ``[H/2,W/2]`` (yuyv: each row twice), with their RGB."""
    wide = [np.repeat(plane, 2, axis=1) for plane in (u, v)]
    whole = [np.repeat(plane, 2, axis=0) for plane in wide]
    interleaved = np.stack([u, v], axis=-1).reshape(len(u), -1)
    yuyv = np.stack([y, np.repeat(interleaved, 2, axis=0)], axis=-1)
    rgb = reference(y, *whole)
    i420 = np.concatenate([y, u, v], axis=None).reshape(-1, y.shape[1])
    return {"nv12": (np.concatenate([y, interleaved]), rgb), "i420": (i420, rgb), "yuyv": (yuyv, rgb)}


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_every_layout_equals_the_formulas(rows: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    y = random.integers(0, 256, (2 * rows, 2 * columns), np.uint8)
    u, v = random.integers(0, 256, (2, rows, columns), np.uint8)
    made = frames(y, u, v)
    assert tuple(made) == YUV_COLORS
    for color, (frame, rgb) in made.items():
        assert np.abs(np.asarray(load_image(frame, color)) - rgb).max() <= 0.5 + FLOAT32_ERROR


def test_yuyv_has_chroma_of_every_row() -> None:
    frame = np.array([[[81, 90], [81, 240]], [[145, 54], [145, 34]], [[41, 240], [41, 110]]], np.uint8)
    red, green, blue = np.asarray(load_image(frame, "yuyv"))[:, 0].tolist()
    assert (red, green, blue) == ([254, 0, 0], [0, 255, 1], [0, 0, 255])


@pytest.mark.parametrize(("value", "gray"), [(0, 0), (16, 0), (126, 128), (235, 255), (255, 255)])
def test_limited_range(value: int, gray: int) -> None:
    frame = np.full((6, 4), 128, np.uint8)
    frame[:4] = value
    assert (np.asarray(load_image(frame, "nv12")) == gray).all()


@pytest.mark.parametrize("color", YUV_COLORS)
def test_a_view_is_read_and_not_kept(color: Any) -> None:
    buffer = np.random.default_rng(3).integers(0, 256, (12, 16, 2), np.uint8)
    frame = buffer[:, ::2] if color == "yuyv" else buffer[:, ::2, 0]
    image = load_image(frame, color)
    expected = np.asarray(load_image(np.ascontiguousarray(frame), color)).copy()
    buffer[:] = 0
    assert (np.asarray(image) == expected).all()


@pytest.mark.parametrize(
    ("color", "shape", "dtype"),
    [
        ("nv12", (7, 4), np.uint8),  # H would be 14/3
        ("nv12", (6, 5), np.uint8),  # an odd width
        ("i420", (6, 4, 1), np.uint8),
        ("nv12", (6, 4), np.uint16),
        ("nv12", (4, 4, 3), np.uint8),
        ("i420", (6,), np.uint8),
        ("yuyv", (4, 3, 2), np.uint8),
        ("yuyv", (4, 4, 3), np.uint8),
        ("yuyv", (4, 4), np.uint8),
        ("yuyv", (4, 4, 2), np.float32),
    ],
)
def test_other_shapes_and_dtypes_are_refused(color: Any, shape: tuple[int, ...], dtype: Any) -> None:
    with pytest.raises(UsageError) as error:
        load_image(np.zeros(shape, dtype), color)
    expected = "[H, W, 2] with even W" if color == "yuyv" else "[H * 3 / 2, W] with even H and W"
    assert str(error.value) == (
        f"The {color} frame has shape {list(shape)} and dtype {np.dtype(dtype)}; expected uint8 {expected}."
    )


@pytest.mark.parametrize("color", YUV_COLORS)
def test_empty_frames_are_refused(color: Any) -> None:
    with pytest.raises(FusionError, match=f"The {color} frame is empty"):
        load_image(np.zeros((0, 4, 2) if color == "yuyv" else (0, 4), np.uint8), color)


def test_masked_frames_are_refused() -> None:
    with pytest.raises(UsageError, match="masked"):
        load_image(np.ma.masked_equal(np.zeros((6, 4), np.uint8), 0), "nv12")


@pytest.mark.parametrize("color", ["NV12", "", None, 3, ["nv12"], "x" * 200])
def test_other_names_are_refused(color: Any) -> None:
    with pytest.raises(UsageError, match=r"color is .*; expected 'rgb', 'bgr', 'nv12', 'i420', 'yuyv'\.$") as error:
        load_image(np.zeros((6, 4), np.uint8), color)
    assert len(str(error.value)) < 160


def test_every_layout_has_a_name() -> None:
    assert set(YUV_COLORS) < set(get_args(Color))
