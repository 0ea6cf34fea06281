"""Pictures of requests: from a URL to crops, with a cache of the latest ones."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
from PIL import Image, ImageOps

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.images.image_files import FORMATS, check_size
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image
from fusion_edge.runtime.requests import Crops
from fusion_edge.runtime.serve.errors import ApiError

CACHED_CROPS = 16
"""Limit of cached crops, 2.2 MB each."""


class ImageSource(Protocol):
    """Where pictures come from."""

    async def load(self, url: str, param: str) -> tuple[Image.Image | npt.NDArray[Any], str]:
        """Return a URL's picture and a digest of its content. Raise :class:`ApiError` about the field ``param``."""
        ...


class DataUrls:
    """Decodes ``data:`` URLs, which hold an image file."""

    async def load(self, url: str, param: str) -> tuple[Image.Image, str]:
        """Return the picture, upright, and a digest of the file. Raise :class:`ApiError` about ``param``."""
        return await asyncio.to_thread(_decode, url, param)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a request."""

    crops: Crops
    digest: str
    """Equal for equal content."""


class Pictures:
    """Loads pictures and cuts them, in threads, and keeps the crops of the latest ones. For one event loop."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._latest: OrderedDict[str, Crops] = OrderedDict()
        """By digest, least recently used first."""

    async def load(self, url: str, param: str) -> Picture:
        """Return the picture of a URL. Raise :class:`ApiError` about the field ``param``."""
        is_content = url[:5].lower() == "data:"
        if is_content:
            digest = await asyncio.to_thread(_digest, url)
            if (found := self._find(digest)) is not None:
                return found
        image, content = await self._source.load(url, param)
        digest = digest if is_content else content
        found = self._find(digest)
        if found is None:
            crops = Crops(await asyncio.to_thread(_cut, image, param))
            self._latest[digest] = crops
            if len(self._latest) > CACHED_CROPS:
                self._latest.popitem(last=False)
            found = Picture(crops, digest)
        return found

    def _find(self, digest: str) -> Picture | None:
        if digest not in self._latest:
            return None
        self._latest.move_to_end(digest)
        return Picture(self._latest[digest], digest)


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()


def _cut(image: Image.Image | npt.NDArray[Any], param: str) -> npt.NDArray[Any]:
    try:
        return cut_crops(load_image(image))
    except FusionError as error:
        raise ApiError(400, f"{param}: {error}", param, "invalid_image") from None


def _decode(url: str, param: str) -> tuple[Image.Image, str]:
    head, comma, data = url.partition(",")
    if not (comma and head.lower().startswith("data:image/") and head.lower().endswith(";base64")):
        message = f"{param}: expected a data URL such as data:image/jpeg;base64,..."
        raise ApiError(400, message, param, "invalid_image_url")
    try:
        content = base64.b64decode(data, validate=True)
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
        check_size(opened.size, "the picture")
        image = ImageOps.exif_transpose(opened).convert("RGB")
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param}: the data is not base64 ({error}).", param, "invalid_image") from None
    except FusionError as error:
        raise ApiError(400, f"{param}: {error}", param, "invalid_image") from None
    except Exception as error:  # Pillow raises many types for damaged data
        reason = type(error).__name__
        message = (
            f"{param}: the picture cannot be decoded ({reason}); expected a complete file of {', '.join(FORMATS)}."
        )
        raise ApiError(400, message, param, "invalid_image") from None
    return image, hashlib.sha256(content).hexdigest()
