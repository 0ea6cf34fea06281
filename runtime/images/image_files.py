"""Pictures in files: which are opened at all, and what decoding them may take."""

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

from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, _imaging

from fusion_edge.runtime.errors import FusionError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Of Pillow's formats those of pictures, whose decoders start no other program; PPM stands for PBM, PGM and PNM too."""
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
MAX_BYTES = 128 << 20  # a file may have, and what decodes it may take
SLOW_PIXELS = 640 * 480  # of what Pillow decodes in Python
METADATA_BYTES = 8 << 20  # a file may have beside what its pixels need
METADATA_READS = 20_000  # a fraction of a second
WHOLE_BYTES = 32 << 20  # of a file that Pillow reads at once (WebP)

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)  # of "//" a path keeps one slash
_SLOW_DECODERS = {"bmp_rle", "ppm_plain"}
_WEBP_BUFFERS = 11  # bytes a pixel beside the picture, measured
_NAMED_CHARACTERS = 200  # of a path in an error
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Pillow logs what a file has wrong, and Python prints that where a program has no logging of its own.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323  # tags of TIFF


def is_address(path: str) -> bool:
    """Whether ``path`` is an address such as ``https://host/picture.png``, and no file has that name."""
    return _ADDRESS.match(path) is not None and not os.path.lexists(path)


def image_name(path: str) -> str:
    """How errors name the image in a file."""
    return f"The image {path[:_NAMED_CHARACTERS] + '...' * (len(path) > _NAMED_CHARACTERS)!r}"


@contextmanager
def open_image(path: str) -> Iterator[ImageFile.ImageFile]:
    """The picture in a file, of one of ``FORMATS`` and not yet decoded; large JPEG files will be decoded reduced.

    Raises ``FusionError`` for an address, for what is no readable file, no picture of these formats or damaged, and
    for a picture that would take more than ``MAX_BYTES``.
    """
    name = image_name(path)
    _check_file(path, name)
    try:
        file = _BoundedFile(path, name)
    except OSError as error:
        raise FusionError(f"{name} cannot be read ({error.strerror}); check its permissions.") from error
    with file, _open(file, name) as opened:
        yield opened


def check_decoded(image: Image.Image, name: str) -> None:
    """Refuse a Pillow image that would still have to be decoded from a format that is not accepted."""
    pending = bool(getattr(image, "tile", None)) or isinstance(image, ImageFile.StubImageFile)
    if pending and image.format not in (*FORMATS, "MPO"):
        raise FusionError(
            f"{name} has the format {image.format}, accepted are {', '.join(FORMATS)}; "
            "decode it yourself if you trust it (load())."
        )


def check_size(size: tuple[int, int], name: str, limit: int = MAX_BYTES // 4) -> None:
    """Refuse an empty image, and one of more than ``limit`` pixels, before a pixel of it is decoded."""
    width, height = size
    if width < 1 or height < 1:
        raise FusionError(f"{name} is empty ({width} x {height} pixels).")
    if width * height > limit:
        raise FusionError(
            f"{name} is too large: {width} x {height} = {width * height} pixels, "
            f"the limit for an image of its kind is {limit}; scale it down first."
        )


def orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1, which is upright, where it says none."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable metadata says nothing about the pixels, which are fine
        return 1
    return value if isinstance(value, int) else 1


def undecodable(name: str, error: Exception) -> FusionError:
    """The error for whatever a decoder of Pillow's raised."""
    reason = f"{type(error).__name__}: {error}"
    return FusionError(f"{name} cannot be decoded ({reason}); check that it is whole, or save it again.")


def _check_file(path: str, name: str) -> None:
    """Refuse what is no regular file of a fitting size, without opening it: a pipe would wait, a device never end."""
    if is_address(path):
        raise FusionError(f"{name} is an address, and addresses are not fetched; download it and give the file's path.")
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FusionError(f"{name} does not exist; check the path.") from error
    except OSError as error:
        raise FusionError(f"{name} cannot be read ({error.strerror}); check the path and its permissions.") from error
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise FusionError(f"{name} is no path that a file can have ({error}); check the path.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise FusionError(f"{name} is {kind}; give the path of one image file.")
    if status.st_size > MAX_BYTES:
        raise FusionError(f"{name} has {status.st_size} bytes, the limit is {MAX_BYTES}; scale it down first.")


class _BoundedFile(io.BufferedReader):
    """A file that ends what reads more of it than a picture needs, as metadata may make Pillow do."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(io.FileIO(path))
        self._name = name
        self._bytes, self._reads = METADATA_BYTES, METADATA_READS

    def read(self, size: int | None = -1, /) -> bytes:
        whole = size is None or size < 0
        data = super().read(WHOLE_BYTES + 1 if whole else size)
        if whole and len(data) > WHOLE_BYTES:
            raise FusionError(f"{self._name} has more than {WHOLE_BYTES} bytes, the limit of its kind; scale it down.")
        self._bytes -= 0 if whole else len(data)
        self._reads -= 1
        if min(self._bytes, self._reads) < 0:
            raise FusionError(f"{self._name} has more metadata than {METADATA_BYTES} bytes; save it again without.")
        return data

    def allow(self, pixels: int) -> None:
        """Let the pixels be read, of at most four samples of 32 bits, and one at a time where they are run lengths."""
        self._bytes += 16 * pixels
        self._reads += min(pixels, SLOW_PIXELS) + pixels // 64


@functools.cache
def _quiet_libtiff() -> None:
    """Have libtiff, which Pillow's module of C is linked to, print nothing: what matters becomes an error of ours."""
    library = ctypes.CDLL(_imaging.__file__)
    for setter in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(library, setter):  # not where Pillow holds a libtiff whose names are its own
            getattr(library, setter)(None)


def _open(file: _BoundedFile, name: str) -> ImageFile.ImageFile:
    try:
        opened = Image.open(file, formats=FORMATS)
        _check_cost(opened, file, name)
    except FusionError:
        raise
    except UnidentifiedImageError as error:
        raise FusionError(
            f"{name} is not an image of an accepted format ({', '.join(FORMATS)}); convert it to PNG or JPEG."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FusionError(f"{name} is too large: {error}; scale it down first.") from error
    except Exception as error:  # Pillow's readers let many types escape on a damaged header
        raise undecodable(name, error) from error
    if opened.format == "TIFF":
        _quiet_libtiff()
    file.allow(opened.width * opened.height)
    return opened


def _check_cost(image: ImageFile.ImageFile, file: _BoundedFile, name: str) -> None:
    """Refuse an opened image that takes more than ``MAX_BYTES`` to decode; have JPEG, where that helps, reduced."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        check_size(image.size, name, MAX_PIXELS)
        _reduce(image, file, name)
    elif _decoders(image) & _SLOW_DECODERS:
        check_size(image.size, name, SLOW_PIXELS)
    else:
        # What is compressed as a whole is held beside the picture, read or mapped.
        whole = image.format == "WEBP" or (image.format == "TIFF" and _decoders(image) != {"raw"})
        held = os.fstat(file.fileno()).st_size if whole else 0
        check_size(image.size, name, int((MAX_BYTES - held) / _bytes_a_pixel(image)))


def _decoders(image: ImageFile.ImageFile) -> set[str]:
    """Pillow's names of what will decode the pixels."""
    return {tile[0] for tile in image.tile}


def _bytes_a_pixel(image: ImageFile.ImageFile) -> float:
    """What decoding and converting takes."""
    copy = 0 if image.mode == "RGB" and "ppm" not in _decoders(image) else 4
    if image.format == "WEBP":
        return 4 + max(copy, _WEBP_BUFFERS)
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return (1 if image.mode in ("1", "L", "P") else 4) + copy
    if _decoders(image) == {"raw"}:
        return 4 + copy
    # A strip or a tile is decoded whole, and a tile may be larger than the picture.
    tags, pixels = image.tag_v2, max(1, image.width * image.height)
    strip = image.width * min(int(tags.get(_ROWS_PER_STRIP, image.height)), image.height)
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
    return 4 + max(copy, 4 * max(strip, tile) / pixels)


def _reduce(image: JpegImagePlugin.JpegImageFile, file: _BoundedFile, name: str) -> None:
    """Choose the largest scale at which decoding fits into ``MAX_BYTES``."""
    pixels = image.width * image.height
    coefficients = pixels * _coefficient_bytes(image, file)
    copies = 1 if image.mode == "RGB" and orientation(image) == 1 else 2
    for scale in (1, 2, 4, 8):
        decoded = 4 * pixels / scale**2
        if max(coefficients + decoded, copies * decoded) <= MAX_BYTES:
            break
    else:
        limit = int(MAX_BYTES * pixels / (coefficients + decoded))
        check_size(image.size, name, limit)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))


def _coefficient_bytes(image: JpegImagePlugin.JpegImageFile, file: _BoundedFile) -> float:
    """Bytes a pixel of the coefficients that libjpeg keeps of a file in several scans, progressive or not."""
    layers = [(across, down) for _, across, down, _ in image.layer]
    # The head of the first scan, behind which Pillow stopped: a marker, its length and the number of components.
    whole = bytes([0xFF, 0xDA, 0, 6 + 2 * len(layers), len(layers)])
    behind = file.tell()
    file.seek(behind - 8 - 2 * len(layers))
    head = file.read(len(whole))
    file.seek(behind)
    if "progressive" not in image.info and head == whole:
        return 0
    widest, tallest = max(across for across, _ in layers), max(down for _, down in layers)
    return 2 * sum(across * down for across, down in layers) / (widest * tallest)
