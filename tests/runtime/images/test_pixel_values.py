"""Pixels of every dtype: scaled by their range, or refused with the expected range; never silently black or white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.preprocessing import load_image

GRAY = np.random.default_rng(0).integers(0, 256, (6, 5), np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (6, 5, 3), np.uint8)


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


def three(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.stack([gray] * 3, axis=-1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "array",
    [
        (RGB / 255).astype(np.float16),
        (RGB / 255).astype(np.float32),
        RGB / 255,
        (RGB / 255).astype(">f4"),
        RGB.astype(np.uint16) * 257,
        (RGB.astype(np.uint16) * 257).astype(">u2"),
        np.ma.masked_array(RGB, mask=False),
        np.asfortranarray(RGB),
        np.broadcast_to(RGB[None], (1, *RGB.shape))[0],
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_are_scaled_by_the_range_of_their_type(array: npt.NDArray[Any]) -> None:
    before = array.copy()
    array.setflags(write=False)
    np.testing.assert_array_equal(pixels(load_image(array)), RGB)
    np.testing.assert_array_equal(pixels(load_image(array[::-1, ::-2])), RGB[::-1, ::-2])
    np.testing.assert_array_equal(pixels(load_image(array, color="bgr")), RGB[..., ::-1])
    np.testing.assert_array_equal(array, before)


def test_booleans_are_black_and_white() -> None:
    np.testing.assert_array_equal(pixels(load_image(GRAY > 99)), three((GRAY > 99) * np.uint8(255)))


def test_large_arrays_are_scaled_block_by_block() -> None:
    array = np.linspace(0, 1, 3000 * 800, dtype=np.float32).reshape(3000, 800)
    np.testing.assert_array_equal(pixels(load_image(array))[..., 0], np.rint(array.astype(np.float64) * 255))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "named"),
    [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (-0.25, "-0.25"), (1.5, "1.5"), (128.0, "128")],
)
def test_floats_out_of_range(value: float, named: str, tmp_path: Path) -> None:
    array = np.full((40, 40), 0.5, np.float32)
    array[39, 3] = value
    with pytest.raises(UsageError, match=f"The image array holds the value {named}; expected floats from 0 to 1"):
        load_image(array)
    image = Image.fromarray(array)
    image.save(tmp_path / "image.tif")
    for source in (image, tmp_path / "image.tif"):
        with pytest.raises(FusionError, match=f"holds the value {named}; expected floats from 0 to 1"):
            load_image(source)


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", "u4", "u8", "c8", "O", "U1"])
def test_dtypes_without_a_known_range(kind: Any) -> None:
    with pytest.raises(UsageError, match="whose range is not known; expected 8 bits"):
        load_image(np.zeros((4, 4, 3), kind))


def test_masked_values() -> None:
    with pytest.raises(UsageError, match="masked values; fill them first"):
        load_image(np.ma.masked_array(GRAY, mask=GRAY > 99))


class Tensor:
    """Looks like a tensor of another library."""

    shape = (4, 4, 3)

    def __array__(self) -> npt.NDArray[np.uint8]:
        return RGB


def test_other_libraries_arrays() -> None:
    tensor: Any = Tensor()
    with pytest.raises(UsageError, match="of type Tensor; expected a path, a Pillow image or a NumPy array"):
        load_image(tensor)


def test_gray_pillow_images_of_more_bits(tmp_path: Path) -> None:
    images: dict[str, Any] = {"float": (GRAY / 255).astype(np.float32), "sixteen": GRAY.astype(np.uint16) * 257}
    for name, values in images.items():
        image = Image.fromarray(values)
        image.save(tmp_path / f"{name}.tif")
        for source in (image, tmp_path / f"{name}.tif"):
            np.testing.assert_array_equal(pixels(load_image(source)), three(GRAY))


@pytest.mark.parametrize("scale", [1, 257, 1 << 20])
def test_32_bit_integers_are_refused(scale: int, tmp_path: Path) -> None:
    image = Image.fromarray(GRAY.astype(np.int32) * scale)
    image.save(tmp_path / "image.tif")
    for source in (image, tmp_path / "image.tif"):
        with pytest.raises(FusionError, match=r"holds int32, whose range is not known; expected 8 bits .* 16 bits"):
            load_image(source)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_that_pillow_converts(mode: str) -> None:
    source = Image.fromarray(RGB)
    for step in {"RGBa": ["RGBA"], "PA": ["P"]}.get(mode, []):
        source = source.convert(step)
    image = source.convert(mode)
    np.testing.assert_array_equal(pixels(load_image(image)), pixels(image.convert("RGB")))
    assert image.mode == mode


def test_a_mode_that_pillow_does_not_convert() -> None:
    with pytest.raises(FusionError, match="mode La, which does not convert to RGB"):
        load_image(Image.new("La", (4, 4)))


@pytest.mark.filterwarnings("error")
def test_palette_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).convert("P")
    expected = pixels(image.convert("RGB"))
    image.info["transparency"] = bytes(range(256))
    image.save(tmp_path / "image.png")
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "image.png")), expected)
    np.testing.assert_array_equal(pixels(load_image(image)), expected)
    assert image.info["transparency"] == bytes(range(256))


@pytest.mark.parametrize("maximum", [1, 15, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("bands", [1, 3])
def test_pnm_of_every_range(maximum: int, bands: int, tmp_path: Path) -> None:
    values = np.random.default_rng(maximum).integers(0, maximum + 1, (70, 5, bands))
    values[0, :2] = [[0], [maximum]]
    path = tmp_path / "image.pnm"
    data = values.astype(">u1" if maximum < 256 else ">u2").tobytes()
    path.write_bytes(b"P%d 5 70 %d\n" % (5 if bands == 1 else 6, maximum) + data)
    loaded = pixels(load_image(path))
    assert np.abs(loaded - values * (255 / maximum)).max() <= 0.51
    with Image.open(path) as opened:  # Pillow's slow decoder
        np.testing.assert_array_equal(loaded, pixels(load_image(opened)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FusionError, match="cannot be decoded"):
        load_image(path)


def test_sixteen_bit_colors(tmp_path: Path) -> None:
    """Pillow reads the upper 8 bits of PNG and TIFF."""
    path = tmp_path / "image.ppm"
    path.write_bytes(b"P6 5 6 65535\n" + (RGB.astype(np.uint16) * 257).astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(load_image(path)), RGB)
