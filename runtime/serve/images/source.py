"""From the URL of a request to a decoded picture."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from PIL import Image

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.images.preprocessing import decode_image
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.images.data_url import decode_data_url, is_data_url
from fusion_edge.runtime.serve.images.errors import ImageError, Reason
from fusion_edge.runtime.serve.images.folder import read_file, relative_parts
from fusion_edge.runtime.serve.images.https import HttpsFetcher
from fusion_edge.runtime.serve.images.limits import ImageLimits
from fusion_edge.runtime.serve.workers import Workers

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)


@dataclass(frozen=True)
class LoadedImage:
    """A picture of a request."""

    image: Image.Image
    """RGB, upright."""
    digest: str
    """SHA-256 of the encoded bytes, in hexadecimal."""


class ImageSource:
    """Loads the pictures of requests. Close it after the last request."""

    def __init__(self, limits: ImageLimits, fetcher: HttpsFetcher | None = None) -> None:
        self._limits = limits
        self._fetcher = fetcher or HttpsFetcher(limits)
        self._decoders = Workers(limits.decodes, "image")

    async def load(self, url: str, param: str) -> LoadedImage:
        """Load a picture.

        Args:
            url: ``data:`` URL; or ``https:`` URL, ``file:`` URL or name in the folder, if the limits allow it.
            param: The field of the request that has the URL, for errors.

        Raises:
            ApiError: The URL is not allowed or invalid, or the picture is not readable or too large (status 400).
        """
        try:
            read = await self._reader(url)
            return await self._decoders.run(self._decode, read)
        except ImageError as error:
            raise ApiError(400, error.message, param, error.reason.value) from None

    def close(self) -> None:
        """Let the threads end after their picture."""
        self._decoders.close()

    async def _reader(self, url: str) -> Callable[[], bytes]:
        """Return a function that returns the encoded picture, to be called in a thread."""
        limits = self._limits
        if is_data_url(url):
            return partial(decode_data_url, url, limits.max_bytes)
        scheme = _SCHEME.match(url)
        name = scheme[1].lower() if scheme else "file"
        if name == "https" and limits.hosts:
            fetched = await self._fetcher.fetch(url)
            return lambda: fetched
        if name == "file" and limits.folder is not None:
            return partial(read_file, limits.folder, relative_parts(url, limits.folder), limits.max_bytes)
        raise ImageError(Reason.NOT_ALLOWED, f"The picture's URL is not {self._expected()}.")

    def _expected(self) -> str:
        allowed = ["a data: URL such as data:image/png;base64,..."]
        allowed += ["an https: URL of an allowed host"] if self._limits.hosts else []
        allowed += ["the name of a file in the server's folder"] if self._limits.folder else []
        more = "" if self._limits.hosts or self._limits.folder else ", and the server opens no others"
        return " or ".join(allowed) + more

    def _decode(self, read: Callable[[], bytes]) -> LoadedImage:
        encoded = read()
        try:
            image = decode_image(encoded, self._limits.max_pixels)
        except FusionError as error:
            raise ImageError(Reason.INVALID_IMAGE, str(error)) from None
        return LoadedImage(image, hashlib.sha256(encoded).hexdigest())
