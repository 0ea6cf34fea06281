"""Images of requests have the same crops as files, with less memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from fusion_edge.runtime import FusionError
from fusion_edge.runtime.images.encoded import decode
from fusion_edge.runtime.images.image_files import MAX_SIDE
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values)


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode != "I;16":
        return image.convert(mode)
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def saved(image: Image.Image, kind: str = "PNG", orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **options)
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(MODES), st.integers(1, 8))
def test_crops_are_those_of_a_file(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, mode: str, orientation: int
) -> None:
    data = saved(in_mode(picture(width, height), mode), orientation=orientation)
    path: Path = tmp_path_factory.getbasetemp() / "encoded.png"
    path.write_bytes(data)
    assert np.array_equal(decode(data, 90_000).crops(), cut_crops(load_image(path)))


@pytest.mark.parametrize(("mode", "orientation"), [("CMYK", 1), ("CMYK", 5), ("RGB", 6), ("L", 8)])
def test_crops_of_a_jpeg(tmp_path: Path, mode: str, orientation: int) -> None:
    data = saved(picture(201, 130).convert(mode), "JPEG", orientation)
    (tmp_path / "x.jpg").write_bytes(data)
    assert np.array_equal(decode(data, 90_000).crops(), cut_crops(load_image(tmp_path / "x.jpg")))


def test_a_format_that_takes_more_memory_has_a_lower_limit() -> None:
    pixels = 2000 * 2000
    assert decode(saved(picture(2000, 2000).convert("RGB")), pixels).image.size == (2000, 2000)
    with pytest.raises(FusionError, match="for this format; scale it down"):
        decode(saved(Image.new("RGB", (2000, 2000)), "WEBP"), pixels)
    large = saved(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    assert decode(large, pixels).image.size == (1000, 1000)
    assert decode(saved(Image.new("RGB", (2000, 2000)), "JPEG"), pixels).image.size == (2000, 2000)


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)])
def test_a_side_is_limited(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(tmp_path / "x.png")
    for call in (
        lambda: decode((tmp_path / "x.png").read_bytes(), 90_000),
        lambda: load_image(tmp_path / "x.png"),
        lambda: load_image(np.zeros(size, np.uint8)),
    ):
        with pytest.raises(FusionError, match=f"more than the limit of {MAX_SIDE} a side"):
            call()
