"""From a picture to the five normalised crops of FUSION.md section 1."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from fusion_edge.runtime.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.errors import FusionError, UsageError

MAX_PIXELS = 2 * 89_478_485  # where Pillow's own guard against decompression bombs refuses to go on
CROPS_A_SIDE = 2  # the global crops are a 2 x 2 arrangement

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of EXIF's orientation."""


def load_image(
    image: str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8], color: Literal["rgb", "bgr"] = "rgb"
) -> Image.Image:
    """The picture as RGB: a file turned upright by its EXIF orientation, or pixels as they are handed over.

    Arrays are uint8 ``[H, W, 3]``, ``[H, W, 1]`` or ``[H, W]``; ``color`` is the order of an array's three
    channels and says nothing about files and Pillow images, which know their own. 16-bit grayscale is scaled
    to 8 bits; every other mode is converted as the released code does it, by Pillow's ``convert("RGB")``.

    Raises ``UsageError`` for an argument of the wrong kind and ``FusionError`` for a file that is missing,
    no image, damaged, empty or larger than ``MAX_PIXELS``.
    """
    if color not in ("rgb", "bgr"):
        raise UsageError(f"color is {color!r}; expected 'rgb' or 'bgr'.")
    if isinstance(image, np.ndarray):
        return _from_array(image, color)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "The image")
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise UsageError(
            f"The image is of type {type(image).__name__}; expected a path, a Pillow image or a uint8 array."
        )
    return _from_file(path)


def cut_crops(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The crops of an RGB image, uint8 ``[5, 384, 384, 3]``: four global ones row by row, then the local one.

    FUSION.md section 1; the aspect ratio is not kept.
    """
    side = CROPS_A_SIDE * IMAGE_SIZE
    crops = np.empty((GLOBAL_CROPS + 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    whole = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    tiles = whole.reshape(CROPS_A_SIDE, IMAGE_SIZE, CROPS_A_SIDE, IMAGE_SIZE, 3).swapaxes(1, 2)
    crops[:GLOBAL_CROPS] = tiles.reshape(GLOBAL_CROPS, IMAGE_SIZE, IMAGE_SIZE, 3)
    crops[GLOBAL_CROPS] = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return crops


def normalize(crops: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 crops ``[N, H, W, 3]`` to contiguous float32 ``[N, 3, H, W]``, -1 to 1 (FUSION.md section 1)."""
    # (x/255 - 0.5)/0.5 in float32 is x/127.5 - 1 to the last bit: multiplying by 2 is exact.
    pixels: npt.NDArray[np.float32]
    pixels = np.divide(crops.transpose(0, 3, 1, 2), np.float32(127.5), dtype=np.float32, order="C")
    pixels -= np.float32(1)
    return pixels


def _from_array(array: npt.NDArray[np.uint8], color: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise UsageError(f"The image array holds {array.dtype}; expected uint8 values from 0 to 255.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        shape = list(array.shape)
        raise UsageError(f"The image array has shape {shape}; expected [H, W, 3], [H, W, 1] or [H, W].")
    _check_size(array.shape[1], array.shape[0], "The image array")
    if array.ndim == 3 and color == "bgr":
        array = array[:, :, ::-1]
    # Pillow may share the array's memory, and a camera overwrites its buffer: convert() always makes a copy.
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _from_file(path: str) -> Image.Image:
    try:
        opened = Image.open(path)
    except FileNotFoundError as error:
        raise FusionError(f"The image {path!r} does not exist; check the path.") from error
    except IsADirectoryError as error:
        raise FusionError(f"The image {path!r} is a directory; give the path of one image file.") from error
    except PermissionError as error:
        raise FusionError(f"The image {path!r} cannot be read; check its permissions.") from error
    except UnidentifiedImageError as error:
        raise FusionError(
            f"{path!r} is not an image that Pillow can read; convert it to PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise FusionError(f"The image {path!r} is too large: {error}; scale it down first.") from error
    except Exception as error:  # Pillow's readers let many types escape on a damaged header
        raise _undecodable(f"The image {path!r}", error) from error
    with opened:
        return _to_rgb(opened, f"The image {path!r}", upright=True)


def _to_rgb(image: Image.Image, name: str, upright: bool = False) -> Image.Image:
    _check_size(image.width, image.height, name)
    try:
        image.load()
        rgb = (_to_eight_bits(image) if _is_sixteen_bits(image) else image).convert("RGB")
    except Exception as error:  # Pillow's readers let many types escape on damaged data
        raise _undecodable(name, error) from error
    # Pixels handed over are left as they are: a caller who turned them may still carry the EXIF tag.
    turn = _UPRIGHT.get(_orientation(image)) if upright else None
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable metadata says nothing about the pixels, which are fine
        return 1
    return orientation if isinstance(orientation, int) else 1


def _undecodable(name: str, error: Exception) -> FusionError:
    reason = f"{type(error).__name__}: {error}"
    return FusionError(f"{name} cannot be decoded ({reason}); check that it is whole, or save it again.")


def _check_size(width: int, height: int, name: str) -> None:
    """Refuse what cannot be resized, before a pixel of it is decoded."""
    if width < 1 or height < 1:
        raise FusionError(f"{name} is empty ({width} x {height} pixels).")
    if width * height > MAX_PIXELS:
        raise FusionError(
            f"{name} is too large: {width} x {height} = {width * height} pixels, "
            f"the limit is {MAX_PIXELS}; scale it down first."
        )


def _is_sixteen_bits(image: Image.Image) -> bool:
    # Some versions of Pillow read 16-bit PNG and PGM files into 32-bit integers, mode "I".
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """65535 / 255 = 257: white stays white, where Pillow's own conversion would clip at 255."""
    return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
