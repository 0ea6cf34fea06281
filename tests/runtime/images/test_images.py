"""Images from files, Pillow and arrays to normalized crops, compared with the released code."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image, ImageOps
from support.paths import GOLDEN

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.image_files import MAX_BYTES
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image, normalize

CASES = ("phi_one_turn", "phi_two_turns", "phi_grid12", "llama_one_turn")


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


def random_pixels(*shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("case", CASES)
def test_crops_equal_the_released_code(case: str) -> None:
    crops = cut_crops(load_image(GOLDEN / f"{case}.png"))
    assert crops.shape == (5, 384, 384, 3)
    golden = np.load(GOLDEN / f"{case}.npz")["crops_uint8_every_8th"].astype(int)
    ours = crops.transpose(0, 3, 1, 2)[:, :, ::8, ::8].astype(int)
    assert np.abs(ours - golden).max() <= 1


def test_crops_of_one_pixel_are_that_pixel() -> None:
    crops = cut_crops(load_image(np.array([[[10, 20, 30]]], np.uint8)))
    assert (crops == [10, 20, 30]).all()


def test_normalize_equals_the_formula_bit_by_bit() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    levels[..., 1] = levels[..., 1].T[None].reshape(levels[..., 1].shape)
    result = normalize(levels)
    assert (result.shape, result.dtype) == ((1, 3, 16, 16), np.dtype(np.float32))
    assert result.flags.c_contiguous
    scaled = levels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(result, (scaled - np.float32(0.5)) / np.float32(0.5))
    assert (result.min(), result.max()) == (-1, 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_ordinary_modes_are_converted_as_pillow_does(mode: str, tmp_path: Path) -> None:
    source = Image.fromarray(random_pixels(7, 5, 4)).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    source.save(path)
    expected = pixels(source.convert("RGB"))
    for image in (path, str(path), source):
        loaded = load_image(image)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(pixels(loaded), expected)


def test_palette_with_transparency_is_not_blended(tmp_path: Path) -> None:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "image.png", transparency=1)
    assert (pixels(load_image(tmp_path / "image.png")) == [200, 100, 50]).all()


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(name: str, tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65000, 65535]], np.uint16)
    path = tmp_path / name
    if name.endswith("pgm"):
        path.write_bytes(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels(load_image(path)), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    upright = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[9, 9, 9], [90, 90, 90], [250, 250, 250]]])
    stored = {  # EXIF 2.3: sides of the scene of the first stored row and column
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "image.png"
    Image.fromarray(np.ascontiguousarray(stored).astype(np.uint8)).save(path, exif=exif)
    np.testing.assert_array_equal(pixels(load_image(path)), upright)
    with Image.open(path) as opened:  # pixels of an opened image stay
        np.testing.assert_array_equal(pixels(load_image(opened)), stored)
        np.testing.assert_array_equal(pixels(ImageOps.exif_transpose(opened)), upright)


def test_unreadable_exif_leaves_the_picture_readable(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "image.png", exif=b"Exif\0\0not a TIFF header")
    assert (pixels(load_image(tmp_path / "image.png")) == [1, 2, 3]).all()


def test_arrays() -> None:
    color = random_pixels(6, 4, 3)
    np.testing.assert_array_equal(pixels(load_image(color)), color)
    np.testing.assert_array_equal(pixels(load_image(color[::2, ::-1])), color[::2, ::-1])
    np.testing.assert_array_equal(pixels(load_image(color, color="bgr")), color[..., ::-1])
    gray = random_pixels(6, 4)
    for array in (gray, gray[..., None]):
        np.testing.assert_array_equal(pixels(load_image(array)), np.stack([gray] * 3, axis=-1))


@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 4)])
def test_an_image_does_not_share_the_camera_buffer(shape: tuple[int, ...]) -> None:
    frame = np.full(shape, 7, np.uint8)
    image = load_image(frame)
    frame[:] = 0
    assert (pixels(image) == 7).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.complex64), "complex64"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((3, 4, 4), np.uint8), "[3, 4, 4]"),
        (np.zeros((4, 4, 4), np.uint8), "[4, 4, 4]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "[1, 4, 4, 3]"),
        (np.zeros(4, np.uint8), "[4]"),
        (None, "NoneType"),
        (b"image.png", "bytes"),
        (7, "int"),
        ([[1, 2]], "list"),
    ],
)
def test_wrong_arguments(array: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_image(array)


def test_wrong_color() -> None:
    color: Any = "hsv"
    with pytest.raises(UsageError, match="hsv"):
        load_image(np.zeros((4, 4, 3), np.uint8), color)


def test_empty_images() -> None:
    for image in (np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8), Image.new("RGB", (0, 3))):
        with pytest.raises(FusionError, match="empty"):
            load_image(image)


def test_unreadable_files(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not an image at all")
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    cases: list[tuple[str | Path, str]] = [
        (tmp_path / "absent.png", "does not exist"),
        (tmp_path, "is a directory"),
        (text, "not an image"),
        (empty, "not an image"),
        ("", "does not exist"),
        ("nul\0byte.png", "is not a valid path"),
        ("https://example.org/cat.png", "is a URL, which is not fetched"),
    ]
    for path, message in cases:
        with pytest.raises(FusionError, match=message) as caught:
            load_image(path)
        assert repr(str(path)) in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
def test_truncated_files(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(64, 64, 3)).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / "image"
    for size in (len(whole) // 2, len(whole) * 3 // 4):
        path.write_bytes(whole[:size])
        with pytest.raises(FusionError, match="image"):
            load_image(path)


def test_damaged_files_never_raise_anything_else(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "image"
    for kind in ("PNG", "JPEG", "TIFF", "GIF"):
        buffer = io.BytesIO()
        Image.fromarray(random_pixels(16, 16, 3)).save(buffer, kind)
        for _ in range(100):
            damaged = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            damaged[generator.integers(0, min(len(damaged), 200), 4)] = generator.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
                with contextlib.suppress(FusionError):
                    assert load_image(path).mode == "RGB"


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def test_large_images_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_size(60_000, 60_000))
    with pytest.raises(FusionError, match="too large") as caught:
        load_image(path)
    assert "3600000000" in str(caught.value)


def test_the_limit_does_not_depend_on_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_size(60_000, 60_000))
    with pytest.raises(FusionError, match=f"60000 x 60000 = 3600000000 pixels, more than .* {MAX_BYTES // 4}"):
        load_image(path)
