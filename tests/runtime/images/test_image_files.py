"""Image files: accepted formats, limits of memory, and the error for everything else."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.images import image_files
from fusion_edge.runtime.images.image_files import FORMATS, MAX_BYTES, MAX_PIXELS, METADATA_BYTES, SLOW_PIXELS
from fusion_edge.runtime.images.preprocessing import load_image


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


def photo(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def error(path: str | Path) -> str:
    with pytest.raises(FusionError) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_accepted_formats(kind: str, tmp_path: Path) -> None:
    photo(20, 10).save(tmp_path / "image", kind)
    assert load_image(tmp_path / "image").size == (20, 10)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a fake of Ghostscript writes when it starts."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "ran"


def test_postscript_starts_no_program(tmp_path: Path, ghostscript: Path) -> None:
    for name in ("image.png", "image.eps"):
        (tmp_path / name).write_bytes(EPS)
        assert "supported format (JPEG, PNG, BMP, GIF, PPM, TIFF, WEBP)" in error(tmp_path / name)
    with Image.open(tmp_path / "image.eps") as opened, pytest.raises(FusionError, match="format EPS; expected"):
        load_image(opened)
    assert not ghostscript.exists()


def test_undecoded_images_of_other_formats_are_refused(tmp_path: Path) -> None:
    photo(20, 10).save(tmp_path / "image.tga")
    assert "supported format" in error(tmp_path / "image.tga")
    with Image.open(tmp_path / "image.tga") as opened:
        with pytest.raises(FusionError, match="format TGA"):
            load_image(opened)
        opened.load()
        assert load_image(opened).size == (20, 10)


# --- Sizes ----------------------------------------------------------------------------------------


def test_large_jpegs_are_decoded_reduced(tmp_path: Path) -> None:
    photo(8000, 5000).save(tmp_path / "image.jpg")
    reduced = load_image(tmp_path / "image.jpg")
    assert reduced.size == (4000, 2500)
    expected = photo(8000, 5000).resize((400, 250))
    assert np.abs(pixels(reduced.resize((400, 250))).astype(int) - pixels(expected)).mean() < 3


def test_the_limit_counts_the_copy_of_a_rotated_jpeg(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo(6000, 4000).save(tmp_path / "turned.jpg", exif=exif)
    photo(6000, 4000).save(tmp_path / "upright.jpg")
    assert load_image(tmp_path / "turned.jpg").size == (2000, 3000)
    assert load_image(tmp_path / "upright.jpg").size == (6000, 4000)


@pytest.mark.parametrize(("options", "size"), [({}, (4500, 4000)), ({"progressive": True}, (2250, 2000))])
def test_the_limit_counts_the_coefficients_of_a_progressive_jpeg(
    tmp_path: Path, options: dict[str, Any], size: tuple[int, int]
) -> None:
    photo(4500, 4000).save(tmp_path / "image.jpg", subsampling=0, **options)
    assert load_image(tmp_path / "image.jpg").size == size


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_jpeg(tmp_path: Path) -> None:
    photo(64, 64).save(tmp_path / "image.jpg")
    content = (tmp_path / "image.jpg").read_bytes()
    frame = content.index(b"\xff\xc0")
    (tmp_path / "image.jpg").write_bytes(content[: frame + 5] + struct.pack(">HH", 9500, 9500) + content[frame + 9 :])
    assert f"90250000 pixels, more than the limit of {MAX_PIXELS} for this format" in error(tmp_path / "image.jpg")


@pytest.mark.parametrize(
    ("mode", "bytes_a_pixel", "options"),
    [("RGB", 4, {}), ("RGBA", 8, {}), ("L", 5, {}), ("RGB", 15, {"format": "WEBP", "lossless": True})],
)
def test_the_limit_is_in_bytes(
    mode: str, bytes_a_pixel: int, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    photo(100, 100).convert(mode).save(path, **{"format": "PNG", **options})  # type: ignore[arg-type]
    held = path.stat().st_size if options else 0
    monkeypatch.setattr(image_files, "MAX_BYTES", 100 * 100 * bytes_a_pixel + held)
    assert load_image(path).size == (100, 100)
    monkeypatch.setattr(image_files, "MAX_BYTES", 100 * 100 * bytes_a_pixel + held - 1)
    assert "more than the limit of 9999 for this format; scale it down" in error(path)


def test_slow_decoders_have_a_lower_limit(tmp_path: Path) -> None:
    (tmp_path / "image.ppm").write_bytes(b"P3 641 480 255\n" + b"7 " * (641 * 480 * 3))
    assert f"more than the limit of {SLOW_PIXELS} for this format" in error(tmp_path / "image.ppm")
    (tmp_path / "image.ppm").write_bytes(b"P3 2 1 255\n1 2 3 4 5 6\n")
    assert pixels(load_image(tmp_path / "image.ppm")).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_empty_run_lengths_end(tmp_path: Path) -> None:
    head = struct.pack("<IiiHHIIiiII", 40, 640, 480, 1, 8, 1, 0, 0, 0, 256, 0)
    runs = b"\0\2\0\0" * 2_000_000
    start = b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078)
    (tmp_path / "image.bmp").write_bytes(start + head + bytes(1024) + runs)
    assert "metadata" in error(tmp_path / "image.bmp")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(
    "chunks",
    [
        chunk(b"eXIf", b"II*\0" + bytes(METADATA_BYTES)),
        chunk(b"prIv", bytes(METADATA_BYTES)),
        b"".join(chunk(b"tEXt", b"x%d\0y" % i) for i in range(100_000)),
    ],
    ids=["one", "unknown", "many"],
)
def test_metadata_without_end(chunks: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    photo(8, 8).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunks + content[33:])
    assert f"has more than {METADATA_BYTES} bytes of metadata" in error(path)


def test_jpeg_metadata_without_end(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    photo(8, 8).save(path)
    content = path.read_bytes()
    segment = b"\xff\xe1" + struct.pack(">H", 65535) + b"Exif\0\0" + bytes(65527)
    path.write_bytes(content[:2] + 200 * segment + content[2:])
    assert "bytes of metadata" in error(path)


def test_data_after_the_pixels_is_not_read(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"):
        photo(20, 10).save(tmp_path / "image", kind)
        alone = pixels(load_image(tmp_path / "image"))
        with (tmp_path / "image").open("ab") as file:
            file.write(bytes(1 << 20))
        np.testing.assert_array_equal(pixels(load_image(tmp_path / "image")), alone)


PEAK = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from fusion_edge.runtime.images import load_image
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
load_image(sys.argv[1])
before = peak()
load_image(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "progressive.jpg", "image.bmp", "float.tif", "image.webp"])
def test_decoding_needs_at_most_150_megabytes(name: str, tmp_path: Path) -> None:
    kinds: dict[str, Callable[[Path], None]] = {
        "image.png": lambda path: Image.new("RGB", (5792, 5792)).save(path),
        "image.jpg": lambda path: Image.new("RGB", (9400, 9500)).save(path),
        "progressive.jpg": lambda path: Image.new("RGB", (6400, 6400)).save(path, progressive=True),
        "image.bmp": lambda path: Image.new("RGB", (5792, 5792)).save(path),
        "float.tif": lambda path: Image.new("F", (4096, 4096), 0.5).save(path),
        "image.webp": lambda path: Image.new("RGB", (3840, 2160)).save(path, lossless=True, method=0),
    }
    photo(8, 8).save(tmp_path / "small.tif")
    kinds[name](tmp_path / name)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small.tif"), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150


def test_large_files_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "image.bmp").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert f"has {MAX_BYTES + 1} bytes, more than the limit of {MAX_BYTES}" in error(tmp_path / "image.bmp")


# --- Paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["http://host/x.png", "https://host/x.png?a=b", "file:///tmp/x.png", "rtsp://host:554/s", "HTTP://HOST/x.png",
     "data:image/png;base64,iVBO", "s3://bucket/x.png"],
)  # fmt: skip
def test_urls_are_not_fetched(address: str) -> None:
    assert error(address) == (
        f"The image {address!r} is a URL, which is not fetched; download it and pass the path of the file."
    )
    if "//" in address:
        assert "is a URL, which is not fetched" in error(Path(address))


def test_a_file_whose_name_looks_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo(8, 8).save("data:x.png")
    assert load_image("data:x.png").size == (8, 8)


def test_invalid_file_names(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    assert "does not exist" in error(path)
    photo(8, 8).save(tmp_path / "image.png")
    os.rename(tmp_path / "image.png", path)
    assert load_image(path).size == (8, 8)
    assert "is not a valid path" in error("\ud800.png")
    assert "cannot be read (File name too long)" in error("x" * 5000)
    assert len(error("x" * 5000)) < 400
    assert "does not exist" in error(tmp_path / "image.png" / "inside")


def test_paths_that_are_not_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "is a pipe; pass the path of an image file" in error(tmp_path / "fifo")
    assert "is a device" in error("/dev/zero")
    assert "is a device" in error("/dev/null")
    assert "is a directory" in error(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        assert "is a socket" in error(tmp_path / "socket")


@pytest.mark.parametrize("change", ["data", "samples"])
def test_a_damaged_tiff_prints_nothing(change: str, tmp_path: Path) -> None:
    """Neither libtiff nor a logger without handlers prints anything."""
    photo(40, 40).save(tmp_path / "image.tiff", compression="tiff_adobe_deflate")
    content = bytearray((tmp_path / "image.tiff").read_bytes())
    if change == "data":
        with Image.open(tmp_path / "image.tiff") as opened:
            [offset] = opened.tag_v2[273]
        content[offset + 10 : offset + 60] = bytes(50)
    else:
        entry = content.index(struct.pack("<HHI", 277, 3, 1))
        content[entry + 8 : entry + 10] = struct.pack("<H", 99)
    (tmp_path / "image.tiff").write_bytes(content)
    script = (
        "import sys\nfrom fusion_edge.runtime.errors import FusionError\n"
        "from fusion_edge.runtime.images.preprocessing import load_image\n"
        "try:\n    load_image(sys.argv[1])\nexcept FusionError as error:\n    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "image.tiff"], capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    assert "image.tiff" in ended.stdout
