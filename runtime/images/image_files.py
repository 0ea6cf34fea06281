"""Image files: accepted formats, and limits of size and memory."""

from __future__ import annotations

import ctypes
import functools
import io
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, _imaging

from fusion_edge.runtime.errors import FusionError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Pillow's formats of pictures, with decoders that start no other program. PPM includes PBM, PGM and PNM."""
MAX_PIXELS = 89_478_485
"""Pillow's threshold of decompression bombs."""
MAX_BYTES = 128 << 20
"""Limit of a file, and of the memory to decode it."""
MAX_SIDE = 32_768
"""Limit of width and height: to resize a side takes 32 bytes of weights a pixel, and up to 3 KiB a row."""
SLOW_PIXELS = 640 * 480
"""Limit of pixels that Pillow decodes in Python."""
METADATA_BYTES = 8 << 20
"""Limit of bytes read in addition to the pixels."""
METADATA_READS = 20_000
"""Limit of reads in addition to those of the pixels: a fraction of a second."""
WHOLE_BYTES = 32 << 20
"""Limit of a file that Pillow reads at once (WebP)."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)  # a path keeps one slash of "//"
_SLOW_DECODERS = {"bmp_rle", "ppm_plain"}
_WEBP_BUFFERS = 11  # bytes per pixel in addition to the image, measured
_NAMED_CHARACTERS = 200  # limit of a path in an error
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class DecodeLimits:
    """What an image may take to decode."""

    bytes: int
    """Memory."""
    pixels: int | None = None
    """Pixels, whatever they take; None for as many as the memory allows."""
    copy: int = 4
    """Bytes a pixel to convert or turn the decoded image."""


# Pillow logs defects of files, and Python prints them in programs that configure no logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323  # tags of TIFF


def is_url(path: str) -> bool:
    """Return whether ``path`` is a URL such as ``https://host/picture.png``, and not the name of a file."""
    return _URL.match(path) is not None and not os.path.lexists(path)


def image_name(path: str) -> str:
    """Return the name of an image file in errors."""
    return f"The image {path[:_NAMED_CHARACTERS] + '...' * (len(path) > _NAMED_CHARACTERS)!r}"


@contextmanager
def open_image(path: str) -> Iterator[ImageFile.ImageFile]:
    """Open an image file of one of :data:`FORMATS`, without decoding it. A large JPEG will decode at a reduced size.

    Raises ``FusionError`` for a URL, a file that is not readable, another format, damage, and an image that needs more
    than :data:`MAX_BYTES` to decode.
    """
    name = image_name(path)
    _check_file(path, name)
    try:
        raw = io.FileIO(path)
        file = _BoundedFile(raw, os.fstat(raw.fileno()).st_size, name)
    except OSError as error:
        raise FusionError(f"{name} cannot be read ({error.strerror}); check its permissions.") from error
    with file, _open(file, name) as opened:
        yield opened


@contextmanager
def open_encoded(data: bytes, name: str, limits: DecodeLimits) -> Iterator[ImageFile.ImageFile]:
    """Open an encoded image in memory as :func:`open_image` opens a file, with limits of its own.

    Raises ``FusionError`` for another format, damage, and an image over the limits.
    """
    with _BoundedFile(io.BytesIO(data), len(data), name) as file, _open(file, name, limits) as opened:
        yield opened


def check_decoded(image: Image.Image, name: str) -> None:
    """Refuse a Pillow image that is not yet decoded from an unsupported format."""
    pending = bool(getattr(image, "tile", None)) or isinstance(image, ImageFile.StubImageFile)
    if pending and image.format not in (*FORMATS, "MPO"):
        raise FusionError(
            f"{name} has the format {image.format}; expected {', '.join(FORMATS)}. If you trust it, decode it with "
            "load() first."
        )


def check_size(size: tuple[int, int], name: str, limit: int = MAX_BYTES // 4) -> None:
    """Refuse an empty image and one of more than ``limit`` pixels or a side over :data:`MAX_SIDE`, before decoding."""
    width, height = size
    if width < 1 or height < 1:
        raise FusionError(f"{name} is empty ({width} x {height} pixels); pass another image.")
    if width * height > limit:
        raise FusionError(
            f"{name} is too large: {width} x {height} = {width * height} pixels, "
            f"more than the limit of {limit} for this format; scale it down first."
        )
    if max(width, height) > MAX_SIDE:
        raise FusionError(
            f"{name} is too large: {width} x {height} pixels, more than the limit of {MAX_SIDE} a side; crop it first."
        )


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) without one."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable metadata does not affect the pixels
        return 1
    return value if isinstance(value, int) else 1


def undecodable(name: str, error: Exception) -> FusionError:
    """Return the error for an exception of Pillow's decoders."""
    reason = f"{type(error).__name__}: {error}"
    return FusionError(f"{name} cannot be decoded ({reason}); check that the file is complete, or save it again.")


def _check_file(path: str, name: str) -> None:
    """Refuse anything but a regular file within the limit, without opening it: a pipe or device could block."""
    if is_url(path):
        raise FusionError(f"{name} is a URL, which is not fetched; download it and pass the path of the file.")
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FusionError(f"{name} does not exist; check the path.") from error
    except OSError as error:
        raise FusionError(f"{name} cannot be read ({error.strerror}); check the path and its permissions.") from error
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise FusionError(f"{name} is not a valid path ({error}); check the path.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a file")
        raise FusionError(f"{name} is {kind}; pass the path of an image file.")
    if status.st_size > MAX_BYTES:
        raise FusionError(
            f"{name} has {status.st_size} bytes, more than the limit of {MAX_BYTES}; scale it down first."
        )


class _BoundedFile(io.BufferedReader):
    """A file that limits reads, because metadata can make Pillow read far more than the pixels."""

    def __init__(self, raw: io.RawIOBase | io.BytesIO, size: int, name: str) -> None:
        super().__init__(raw)
        self.size = size
        self._name = name
        self._bytes, self._reads = METADATA_BYTES, METADATA_READS

    def read(self, size: int | None = -1, /) -> bytes:
        whole = size is None or size < 0
        data = super().read(WHOLE_BYTES + 1 if whole else size)
        if whole and len(data) > WHOLE_BYTES:
            raise FusionError(
                f"{self._name} has more than {WHOLE_BYTES} bytes, the limit of its format; scale it down."
            )
        self._bytes -= 0 if whole else len(data)
        self._reads -= 1
        if min(self._bytes, self._reads) < 0:
            raise FusionError(
                f"{self._name} has more than {METADATA_BYTES} bytes of metadata; save it without metadata."
            )
        return data

    def allow(self, pixels: int) -> None:
        """Raise the limits by the reads of the pixels: up to four samples of 32 bits each."""
        self._bytes += 16 * pixels
        self._reads += min(pixels, SLOW_PIXELS) + pixels // 64


@functools.cache
def _quiet_libtiff() -> None:
    """Silence libtiff, which Pillow's C module links. Its errors become errors of ours."""
    library = ctypes.CDLL(_imaging.__file__)
    for setter in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(library, setter):  # missing if Pillow bundles a libtiff with hidden symbols
            getattr(library, setter)(None)


def _open(file: _BoundedFile, name: str, limits: DecodeLimits | None = None) -> ImageFile.ImageFile:
    limits = limits or DecodeLimits(MAX_BYTES)
    try:
        opened = Image.open(file, formats=FORMATS)
        if limits.pixels is not None and opened.width * opened.height > limits.pixels:
            size = f"{opened.width} x {opened.height} pixels"
            raise FusionError(f"{name} has {size}, more than the limit of {limits.pixels}; scale it down first.")
        _check_cost(opened, file, name, limits)
    except FusionError:
        raise
    except UnidentifiedImageError as error:
        raise FusionError(
            f"{name} is not an image of a supported format ({', '.join(FORMATS)}); convert it to PNG or JPEG."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FusionError(f"{name} is too large: {error}; scale it down first.") from error
    except Exception as error:  # Pillow raises many types for a damaged header
        raise undecodable(name, error) from error
    if opened.format == "TIFF":
        _quiet_libtiff()
    file.allow(opened.width * opened.height)
    return opened


def _check_cost(image: ImageFile.ImageFile, file: _BoundedFile, name: str, limits: DecodeLimits) -> None:
    """Refuse an image that needs more memory to decode than its limit; reduce a JPEG if that suffices."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        check_size(image.size, name, MAX_PIXELS)
        _reduce(image, file, name, limits)
    elif _decoders(image) & _SLOW_DECODERS:
        check_size(image.size, name, SLOW_PIXELS)
    else:
        # A format that is compressed as a whole also holds the file, read or mapped.
        whole = image.format == "WEBP" or (image.format == "TIFF" and _decoders(image) != {"raw"})
        held = file.size if whole else 0
        check_size(image.size, name, int((limits.bytes - held) / _bytes_per_pixel(image, limits.copy)))


def _decoders(image: ImageFile.ImageFile) -> set[str]:
    """Return Pillow's names of the decoders of an image."""
    return {tile[0] for tile in image.tile}


def _bytes_per_pixel(image: ImageFile.ImageFile, copy: int) -> float:
    """Return the bytes per pixel to decode and convert an image. ``copy`` is as in :class:`DecodeLimits`."""
    if "ppm" in _decoders(image):
        copy = 4  # of :func:`.pnm.read_pnm`
    elif image.mode == "RGB":
        copy = 0
    if image.format == "WEBP":
        return 4 + max(copy, _WEBP_BUFFERS)
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return (1 if image.mode in ("1", "L", "P") else 4) + copy
    if _decoders(image) == {"raw"}:
        return 4 + copy
    # A strip or tile is decoded as a whole, and a tile may be larger than the image.
    tags, pixels = image.tag_v2, max(1, image.width * image.height)
    strip = image.width * min(int(tags.get(_ROWS_PER_STRIP, image.height)), image.height)
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
    return 4 + max(copy, 4 * max(strip, tile) / pixels)


def _reduce(image: JpegImagePlugin.JpegImageFile, file: _BoundedFile, name: str, limits: DecodeLimits) -> None:
    """Choose the largest scale that decodes within the limit of memory."""
    pixels = image.width * image.height
    coefficients = pixels * _coefficient_bytes(image, file)
    copy = 0 if image.mode == "RGB" and orientation(image) == 1 else limits.copy
    for scale in (1, 2, 4, 8):
        decoded = 4 * pixels / scale**2
        if max(coefficients + decoded, (4 + copy) / 4 * decoded) <= limits.bytes:
            break
    else:
        limit = int(limits.bytes * pixels / (coefficients + decoded))
        check_size(image.size, name, limit)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))


def _coefficient_bytes(image: JpegImagePlugin.JpegImageFile, file: _BoundedFile) -> float:
    """Return the bytes per pixel of the coefficients that libjpeg keeps for a file in several scans."""
    layers = [(across, down) for _, across, down, _ in image.layer]
    # The header of the first scan, after which Pillow stops: marker, length and number of components.
    whole = bytes([0xFF, 0xDA, 0, 6 + 2 * len(layers), len(layers)])
    position = file.tell()
    file.seek(position - 8 - 2 * len(layers))
    head = file.read(len(whole))
    file.seek(position)
    if "progressive" not in image.info and head == whole:
        return 0
    widest, tallest = max(across for across, _ in layers), max(down for _, down in layers)
    return 2 * sum(across * down for across, down in layers) / (widest * tallest)
