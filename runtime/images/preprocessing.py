"""Preprocessing: from an image to the five normalized crops of docs/fusion-model.md section 1."""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.image_files import (
    MAX_BYTES,
    check_decoded,
    check_size,
    image_name,
    open_image,
    orientation,
    undecodable,
)
from fusion_edge.runtime.images.pixel_values import eight_bits
from fusion_edge.runtime.images.pnm import is_pnm_of_other_range, read_pnm
from fusion_edge.runtime.images.yuv import YUV_COLORS, yuv_to_rgb

Color = Literal["rgb", "bgr", "nv12", "i420", "yuyv"]
"""Layout of an array: channel order ``rgb`` or ``bgr`` of ``[H,W,3]``; ``nv12`` or ``i420`` in uint8 ``[H*3/2,W]`` with
even sides, ``yuyv`` in uint8 ``[H,W,2]`` with even width, each BT.601 with limited range."""

CROPS_A_SIDE = 2  # the global crops are a 2 x 2 arrangement

_COLORS = get_args(Color)
_ROWS = 64  # per block

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose that undoes each EXIF orientation."""


def load_image(image: str | os.PathLike[str] | Image.Image | npt.NDArray[Any], color: Color = "rgb") -> Image.Image:
    """Load an image as RGB. A file is turned upright by its EXIF orientation; pixels stay as they are.

    16-bit and float grayscale is scaled to 8 bits (:func:`.pixel_values.eight_bits`). Every other mode is converted by
    Pillow's ``convert("RGB")``, as in the released code. A JPEG file that needs more than ``image_files.MAX_BYTES`` to
    decode is decoded at a half, a quarter or an eighth of its size; any other such file is refused.

    Args:
        image: Path of a file of one of ``image_files.FORMATS``, Pillow image, or array: ``[H,W,3]``, ``[H,W,1]`` or
            ``[H,W]`` of uint8, uint16, booleans, or floats from 0 to 1; or a YUV frame.
        color: Layout of an array. Files and Pillow images define their own.

    Raises:
        UsageError: An argument has a wrong type or value.
        FusionError: The file is missing, not an image, damaged, empty or too large, or the range of pixels is unknown.
    """
    if color not in _COLORS:
        raise UsageError(f"color is {short_repr(color)}; expected {', '.join(map(repr, _COLORS))}.")
    if isinstance(image, np.ndarray):
        return _from_array(image, color)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise UsageError(
            f"The image is of type {type(image).__name__}; expected a path, a Pillow image or a NumPy array."
        )
    return _from_file(path)


def cut_crops(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the crops of an RGB image, uint8 ``[5,384,384,3]``: four global ones row by row, then the local one.

    An image of one channel has crops ``[5,384,384]``, the same as that channel's of an RGB image.
    The aspect ratio is not kept (docs/fusion-model.md section 1).
    """
    side = CROPS_A_SIDE * IMAGE_SIZE
    whole = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    channels = whole.shape[2:]
    crops = np.empty((GLOBAL_CROPS + 1, IMAGE_SIZE, IMAGE_SIZE, *channels), np.uint8)
    tiles = whole.reshape(CROPS_A_SIDE, IMAGE_SIZE, CROPS_A_SIDE, IMAGE_SIZE, *channels).swapaxes(1, 2)
    crops[:GLOBAL_CROPS] = tiles.reshape(GLOBAL_CROPS, IMAGE_SIZE, IMAGE_SIZE, *channels)
    crops[GLOBAL_CROPS] = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return crops


def normalize(crops: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Convert uint8 crops ``[N,H,W,3]`` to float32 ``[N,3,H,W]`` from -1 to 1 (docs/fusion-model.md section 1)."""
    # In float32 x/127.5 - 1 equals (x/255 - 0.5)/0.5 exactly, because multiplying by 2 is exact.
    pixels: npt.NDArray[np.float32]
    pixels = np.divide(crops.transpose(0, 3, 1, 2), np.float32(127.5), dtype=np.float32, order="C")
    pixels -= np.float32(1)
    return pixels


def _from_array(array: npt.NDArray[Any], color: str) -> Image.Image:
    if np.ma.is_masked(array):
        raise UsageError("The image array has masked values; fill them first (array.filled(0)).")
    array = np.asarray(array)
    if color in YUV_COLORS:
        return yuv_to_rgb(array, color)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        shape = list(array.shape)
        raise UsageError(f"The image array has shape {shape}; expected [H, W, 3], [H, W, 1] or [H, W].")
    check_size((array.shape[1], array.shape[0]), "The image array")
    try:
        array = eight_bits(array)
    except ValueError as error:
        raise UsageError(f"The image array {error}") from None
    array = np.ascontiguousarray(array)
    if array.ndim == 3:  # Pillow reverses the channels ten times as fast as NumPy
        return Image.frombytes("RGB", (array.shape[1], array.shape[0]), array, "raw", color.upper())
    # convert() copies. Without it Pillow may share the array's memory, which a camera overwrites.
    return Image.fromarray(array).convert("RGB")


def _from_pillow(image: Image.Image) -> Image.Image:
    name = "The image"
    check_decoded(image, name)
    check_size(image.size, name)
    decode_pixels(image, name)
    # Ignore the EXIF orientation: the caller may have turned the pixels and kept the tag.
    return image.copy() if image.mode == "RGB" else _to_rgb(image, name)


def _from_file(path: str) -> Image.Image:
    name = image_name(path)
    with open_image(path) as opened:
        return _upright(opened, name)


def _upright(opened: ImageFile.ImageFile, name: str) -> Image.Image:
    """Decode an opened file to RGB, turned upright."""
    if is_pnm_of_other_range(opened):
        try:
            return read_pnm(opened)
        except ValueError as error:
            raise undecodable(name, error) from error
    decode_pixels(opened, name)
    rgb = opened if opened.mode == "RGB" else _to_rgb(opened, name)
    turn = UPRIGHT.get(orientation(opened))
    if turn is None:
        return rgb
    check_size(rgb.size, name, MAX_BYTES // 8)  # transposing makes a copy
    return rgb.transpose(turn)


def decode_pixels(image: Image.Image, name: str) -> None:
    """Decode the pixels of an opened image. Raises ``FusionError`` for damaged ones."""
    try:
        image.load()
    except FusionError:
        raise
    except Exception as error:  # Pillow raises many types for damaged data
        raise undecodable(name, error) from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode[0] == "I":
        try:
            image = gray_levels(image)
        except ValueError as error:
            raise FusionError(f"{name} {error}") from None
    elif "transparency" in image.info:  # dropped, because Pillow warns of it
        image = image.copy()
        del image.info["transparency"]
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise FusionError(
            f"{name} has Pillow's mode {image.mode}, which does not convert to RGB ({error}); convert it first."
        ) from error


def gray_levels(image: Image.Image) -> Image.Image:
    """Scale one channel of 16 or 32 bits to 8 bits, block by block to save memory."""
    # Some versions of Pillow read 16-bit PNG and PGM files into 32-bit integers, mode "I".
    sixteen_bits = image.mode == "I" and image.format in ("PNG", "PPM")
    gray = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, _ROWS):
        rows = np.asarray(image.crop((0, top, image.width, min(top + _ROWS, image.height))))
        gray[top : top + _ROWS] = eight_bits(rows.astype(np.uint16) if sixteen_bits else rows)
    return Image.fromarray(gray)
