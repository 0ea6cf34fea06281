"""Binary PGM and PPM files of any range, which Pillow decodes slowly, in Python."""

from __future__ import annotations

from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageFile

from fusion_edge.runtime.images.pixel_values import eight_bits

_BANDS = {"L": 1, "I": 1, "RGB": 3}
_ROWS = 64  # per read, which bounds the memory


def is_pnm_of_other_range(image: ImageFile.ImageFile) -> bool:
    """Return whether Pillow would scale the values of an opened PGM or PPM in Python."""
    return image.format == "PPM" and image.mode in _BANDS and [tile[0] for tile in image.tile] == ["ppm"]


def read_pnm(image: ImageFile.ImageFile) -> Image.Image:
    """Return the pixels as RGB, bit-identical to Pillow's decoder with 16 bits scaled to 8.

    Raises ``ValueError`` for a truncated file.
    """
    _, _, offset, arguments = image.tile[0]
    maximum, file = cast("tuple[str, int]", arguments)[1], cast("BinaryIO", image.fp)
    values = np.arange(256 if maximum < 256 else 65536)
    top = 65535 if image.mode == "I" else 255
    scaled = np.minimum(np.rint(values / maximum * top), top)
    table = eight_bits(scaled.astype(np.uint16 if top > 255 else np.uint8))
    stored = np.dtype(">u1" if maximum < 256 else ">u2")
    pixels = np.empty((image.height, image.width * _BANDS[image.mode]), np.uint8)
    file.seek(offset)
    for row in range(0, image.height, _ROWS):
        block = pixels[row : row + _ROWS]
        data = file.read(block.size * stored.itemsize)
        if len(data) < block.size * stored.itemsize:
            raise ValueError("the file is truncated")
        block[:] = table[np.frombuffer(data, stored).reshape(block.shape)]
    shape = (image.height, image.width, 3) if image.mode == "RGB" else (image.height, image.width)
    return Image.fromarray(pixels.reshape(shape)).convert("RGB")
