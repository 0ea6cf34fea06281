"""Images of requests: from encoded bytes to crops, in little more memory than the decoded pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.images.image_files import DecodeLimits, open_encoded, orientation, undecodable
from fusion_edge.runtime.images.pnm import is_pnm_of_other_range, read_pnm
from fusion_edge.runtime.images.preprocessing import UPRIGHT, cut_crops, decode_pixels, gray_levels

BYTES_PER_PIXEL = 5
"""Memory of the largest image that is taken: four bytes a decoded pixel, and one of a channel that is converted."""

_NAME = "The image"
_LEAST_BYTES = 16 << 20  # so that a low limit of pixels holds for every format
_ROWS = 64  # per band
_FROM_THE_END = {
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
}
"""Turns that put the first row last, as a row or column."""
_SIDEWAYS = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
"""Turns that exchange width and height."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image that is not converted to RGB or turned upright yet, because that copies it."""

    image: Image.Image
    """Any mode."""
    turn: Image.Transpose | None
    """What makes it upright."""

    def crops(self) -> npt.NDArray[np.uint8]:
        """Return the crops, uint8 ``[5,384,384,3]``, bit-identical to ``cut_crops(load_image(file))``.

        Raises ``FusionError`` for pixels of an unknown range.
        """
        image = self.image
        if image.mode == "RGB" and self.turn is None:
            return cut_crops(image)
        crops = np.empty((GLOBAL_CROPS + 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        if image.mode == "F" or image.mode[0] == "I":
            try:
                image = gray_levels(image)
            except ValueError as error:
                raise FusionError(f"{_NAME} {error}") from None
        for channel in range(3):
            crops[..., channel] = cut_crops(_channel(image, channel, self.turn))
        return crops


def decode(data: bytes, max_pixels: int) -> DecodedImage:
    """Decode an image in memory, in at most :data:`BYTES_PER_PIXEL` times ``max_pixels`` or 16 MiB.

    A JPEG file that needs more is decoded at a half, a quarter or an eighth of its size. Raises ``FusionError`` for
    bytes that are not an image, damaged, empty, of more than ``max_pixels``, or that need more memory.
    """
    limits = DecodeLimits(max(BYTES_PER_PIXEL * max_pixels, _LEAST_BYTES), max_pixels, copy=1)
    with open_encoded(data, _NAME, limits) as opened:
        if is_pnm_of_other_range(opened):
            try:
                return DecodedImage(read_pnm(opened), None)
            except ValueError as error:
                raise undecodable(_NAME, error) from error
        decode_pixels(opened, _NAME)
        return DecodedImage(opened, UPRIGHT.get(orientation(opened)))


def _channel(image: Image.Image, channel: int, turn: Image.Transpose | None) -> Image.Image:
    """Return a channel of the upright RGB image, as an image of mode ``L``, converted band by band."""
    width, height = image.size
    result = Image.new("L", (height, width) if turn in _SIDEWAYS else (width, height))
    for top in range(0, height, _ROWS):
        bottom = min(top + _ROWS, height)
        band = image.crop((0, top, width, bottom))
        band.info.pop("transparency", None)  # dropped, because Pillow warns of it
        try:
            band = band.convert("RGB").getchannel(channel)
        except ValueError as error:
            raise FusionError(f"{_NAME} has Pillow's mode {image.mode}, which does not convert to RGB.") from error
        place = height - bottom if turn in _FROM_THE_END else top
        result.paste(band if turn is None else band.transpose(turn), (place, 0) if turn in _SIDEWAYS else (0, place))
    return result
