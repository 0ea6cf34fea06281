"""Mutate pictures: files of many formats, damaged part by part, and arrays of any type and shape."""

from __future__ import annotations

import argparse
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image
from fuzz.judge import SECONDS, Mutant
from fuzz.mutations import mutate_bytes

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n%%EOF\n"
PPM_TEXT = b"P3\n# a comment\n3 2\n255\n" + b"255 0 0  0 255 0  0 0 255\n" * 2
DTYPES = ["b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "O", "S3", "U3", "M8[s]", "V4"]
SIZES = (0, 1, 2, 3, 4, 9, 384, 600)
DEPTHS = (1, 2, 3, 4, 16)


class Images:
    """See :class:`fuzz.judge.Kind`."""

    share = 30
    batch = 500
    seconds = SECONDS
    growth = 150 << 20
    """Decoding a picture may take more memory; the limit is documented."""

    def prepare(self, folder: Path) -> None:
        self.files = _files()

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        if draw is None:
            return _of_file(folder / "picture.png", self.files["color.png"], ())
        if draw.random() < 0.1:
            array, change = _array(draw)
            color: Any = draw.choice(["rgb", "rgb", "bgr", "nv12", "i420", "yuyv", "BGR", 3, None])
            return Mutant((change, f"color {color!r}"), lambda: _decode(array, color))
        name = draw.choice(sorted(self.files))
        content, changes = self.files[name], [name]
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            content, change = _mutate(draw, content)
            changes.append(change)
        if draw.random() < 0.1:
            name = draw.choice(["picture", "picture.eps", "picture.png", "picture.gz", "ü.jpg"])
        return _of_file(folder / name, content, tuple(changes))


def _of_file(path: Path, content: bytes, changes: tuple[str, ...]) -> Mutant:
    path.write_bytes(content)

    def command(_: argparse.Namespace) -> int:
        _decode(str(path), "rgb")
        return 0

    return Mutant(changes, lambda: run_command(command, argparse.Namespace()))  # as fusion-run does


def _decode(image: Any, color: Any) -> None:
    cut_crops(load_image(image, color))


def _files() -> dict[str, bytes]:
    """Return small pictures in many formats, by name."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 56, 3), np.uint8)
    color = Image.fromarray(noise)
    gray, deep = color.convert("L"), Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    frames = [color.rotate(angle) for angle in (90, 180)]

    def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, image_format, **options)
        return file.getvalue()

    return {
        "color.png": saved(color, "PNG", exif=exif),
        "gray.png": saved(gray, "PNG"),
        "deep.png": saved(deep, "PNG"),
        "palette.png": saved(color.convert("P"), "PNG", transparency=0),
        "alpha.png": saved(color.convert("RGBA"), "PNG"),
        "animated.png": saved(color, "PNG", save_all=True, append_images=frames),
        "color.jpg": saved(color, "JPEG", exif=exif),
        "progressive.jpg": saved(color, "JPEG", progressive=True, comment=b"hello"),
        "cmyk.jpg": saved(color.convert("CMYK"), "JPEG"),
        "two.mpo": saved(color, "MPO", save_all=True, append_images=frames),
        "color.tif": saved(color, "TIFF", exif=exif),
        "lzw.tif": saved(color, "TIFF", compression="tiff_lzw"),
        "deflate.tif": saved(deep, "TIFF", compression="tiff_adobe_deflate"),
        "float.tif": saved(color.convert("F"), "TIFF"),
        "bits.tif": saved(color.convert("1"), "TIFF", compression="group4"),
        "color.webp": saved(color, "WEBP", exif=exif),
        "lossless.webp": saved(color.convert("RGBA"), "WEBP", lossless=True),
        "color.gif": saved(color, "GIF"),
        "animated.gif": saved(color, "GIF", save_all=True, append_images=frames),
        "color.bmp": saved(color, "BMP"),
        "palette.bmp": saved(color.convert("P"), "BMP"),
        "color.ppm": saved(color, "PPM"),
        "deep.pgm": saved(deep, "PPM"),
        "text.ppm": PPM_TEXT,
        "color.ico": saved(color, "ICO"),
        "color.tga": saved(color, "TGA"),
        "color.pcx": saved(color, "PCX"),
        "color.jp2": saved(color, "JPEG2000"),
        "picture.eps": EPS,
    }


def _mutate(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Damage a file by its format's parts if known, or byte by byte."""
    by_part: dict[bytes, Callable[[Random, bytes], tuple[bytes, str]]] = {
        b"\x89PNG": _png,
        b"\xff\xd8\xff": _jpeg,
        b"II*\0": _tiff,
        b"RIFF": _riff,
    }
    for start, mutate in by_part.items():
        if content.startswith(start) and draw.random() < 0.7:
            return mutate(draw, content)
    if draw.random() < 0.3:  # sizes and offsets are in the first bytes of most formats
        head, change = mutate_bytes(draw, content[:40])
        return head + content[40:], f"head: {change}"
    return mutate_bytes(draw, content)


def _png(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Change a chunk and correct its checksum."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return mutate_bytes(draw, content)
    index = draw.randrange(len(chunks))
    name, data = chunks[index]
    what = draw.randrange(7)
    if what == 0:
        del chunks[index]
        change = "removed"
    elif what == 1:
        chunks.insert(draw.randrange(len(chunks) + 1), (name, data))
        change = "twice"
    elif what == 2:
        added = draw.choice([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT"])
        body = draw.choice([b"", b"a\0b", b"a\0\0" + zlib.compress(bytes(1 << 20)), draw.randbytes(26)])
        chunks.insert(1, (added, body))
        change = f"{added.decode()} added"
    elif name == b"IHDR" and len(data) == 13:
        head = list(struct.unpack(">IIBBBBB", data))
        field = draw.randrange(7)
        head[field] = draw.choice(
            [0, 1, 2, 3, 4, 6, 8, 16, 100, 255] if field > 1 else [0, 1, 57, 4000, 9000, 2**31 - 1]
        )
        chunks[index] = name, struct.pack(">IIBBBBB", *head)
        change = f"field {field} = {head[field]}"
    elif name == b"IDAT" and what == 3:
        packed = zlib.compress(draw.choice([b"", bytes(100), bytes(1 << 22), draw.randbytes(10_000)]))
        chunks[index] = name, packed
        change = "other pixels"
    else:
        data, change = mutate_bytes(draw, data)
        chunks[index] = name, data
    written = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return content[:8] + written, f"chunk {name.decode('latin-1')} {change}"


def _jpeg(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Change a segment before the pixels. Correct its length or not."""
    at, segments = 2, []
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] not in (0xD9, 0xDA):
        (size,) = struct.unpack(">H", content[at + 2 : at + 4])
        segments.append((at, size))
        at += 2 + size
    if not segments:
        return mutate_bytes(draw, content)
    start, size = draw.choice(segments)
    marker, end = content[start + 1], start + 2 + size
    data, change = mutate_bytes(draw, content[start + 4 : end])
    if marker in (0xC0, 0xC2) and draw.random() < 0.5:
        height, width = draw.choice([0, 1, 4000, 9000, 65535]), draw.choice([0, 1, 4000, 9000, 65535])
        data = content[start + 4 : start + 5] + struct.pack(">HH", height, width) + content[start + 9 : end]
        change = f"{width} x {height}"
    length = len(data[:65533]) + 2 if draw.random() < 0.8 else draw.choice([0, 1, 2, 65535])
    segment = bytes([0xFF, marker]) + struct.pack(">H", length) + data[:65533]
    what = draw.randrange(8)
    if what == 0:
        return content[:start] + content[end:], f"segment {marker:#x} removed"
    if what == 1:
        return content[:start] + content[start:end] * 2 + content[end:], f"segment {marker:#x} twice"
    return content[:start] + segment + content[end:], f"segment {marker:#x} {change}"


def _tiff(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Change a tag's number, type, count or value."""
    directory = int.from_bytes(content[4:8], "little")
    if len(content) < 8 or directory + 2 > len(content):
        return mutate_bytes(draw, content)
    (count,) = struct.unpack("<H", content[directory : directory + 2])
    at = directory + 2 + 12 * draw.randrange(max(count, 1))
    entry = content[at : at + 12]
    if len(entry) < 12:
        return mutate_bytes(draw, content)
    fields = list(struct.unpack("<HHII", entry))
    index = draw.randrange(4)
    tags = [254, 256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 317, 320, 322, 338, 339, 34665, 34675]
    values = [tags, [0, 1, 2, 3, 4, 5, 12, 13, 99], *[[0, 1, 2, 5, 9000, 65535, 2**31, 2**32 - 1]] * 2]
    fields[index] = draw.choice(values[index])
    changed = content[:at] + struct.pack("<HHII", *fields) + content[at + 12 :]
    return changed, f"tag {struct.unpack('<H', entry[:2])[0]} field {index} = {fields[index]}"


def _riff(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Change a chunk of a WebP file and correct the file's length."""
    chunks, at = [], 12
    while at + 8 <= len(content):
        name, size = content[at : at + 4], struct.unpack("<I", content[at + 4 : at + 8])[0]
        chunks.append((name, content[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    if not chunks:
        return mutate_bytes(draw, content)
    index = draw.randrange(len(chunks))
    name, data = chunks[index]
    data, change = mutate_bytes(draw, data)
    chunks[index] = (draw.choice([name, name, b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF"]), data)
    body = b"".join(n + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for n, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body, f"chunk {name.decode('latin-1')} {change}"


def _array(draw: Random) -> tuple[Any, str]:
    """Return an object that a caller may pass as a picture."""
    what = draw.randrange(12)
    if what == 0:
        wrong: Any = draw.choice([None, 3, 2.5, b"bytes", [], {}, object(), "", "\0", "x" * 5000, "\ud800", Path("/")])
        return wrong, f"{type(wrong).__name__} as a picture"
    shape = tuple(draw.choice(SIZES) for _ in range(draw.randrange(4)))
    if len(shape) == 3:
        shape = (*shape[:2], draw.choice(DEPTHS))
    dtype = np.dtype(draw.choice(DTYPES) if draw.random() < 0.7 else "u1")
    array: npt.NDArray[Any] = np.zeros(shape, dtype)
    if dtype.kind in "uif" and array.size:
        numbers: list[Any] = [0, 1, 255, 65535] if dtype.kind != "f" else [0, 0.5, 1, 255, np.nan, np.inf, -1]
        with np.errstate(all="ignore"):
            array = (
                np.array([draw.choice(numbers) for _ in range(7)])
                .astype(dtype)[np.arange(array.size) % 7]
                .reshape(shape)
            )
    if what == 1 and array.ndim >= 2:
        array = array[::-1, ::2]
    if what == 2:
        array = np.broadcast_to(array, (draw.choice([1, 2, 3]), *array.shape))
    if what == 3 and array.ndim in (2, 3) and array.size:
        mode = draw.choice(
            ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "I;16", "I;16B"]
        )
        return Image.new(mode, (array.shape[1], array.shape[0])), f"Pillow image of mode {mode}"
    return array, f"array {dtype} {list(array.shape)}"
