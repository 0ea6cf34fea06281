"""From the URL of a request to the crops of its picture."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.images.encoded import decode
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.images.data_url import decode_data_url
from fusion_edge.runtime.serve.images.errors import ImageError, Reason
from fusion_edge.runtime.serve.images.folder import read_file, relative_parts
from fusion_edge.runtime.serve.images.https import HttpsFetcher
from fusion_edge.runtime.serve.images.limits import ImageLimits
from fusion_edge.runtime.serve.picture_url import PictureUrl
from fusion_edge.runtime.serve.workers import Workers
from fusion_edge.runtime.system.malloc import TRIMMED_BYTES, return_free_memory

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)


@dataclass(frozen=True)
class LoadedImage:
    """A picture of a request."""

    crops: npt.NDArray[np.uint8]
    """``[5,384,384,3]``."""
    digest: str
    """SHA-256 of the encoded bytes, in hexadecimal."""


class ImageSource:
    """Loads the pictures of requests. Close it after the last request."""

    def __init__(self, limits: ImageLimits, fetcher: HttpsFetcher | None = None) -> None:
        self._limits = limits
        self._fetcher = fetcher or HttpsFetcher(limits)
        self._fetches = asyncio.Semaphore(limits.fetches)
        self._decoders = Workers(limits.decodes, "image")

    async def load(self, url: PictureUrl, param: str) -> LoadedImage:
        """Load a picture.

        Args:
            url: ``data:`` URL; or ``https:`` URL, ``file:`` URL or name in the folder, if the limits allow it. It is
                taken.
            param: The field of the request that has the URL, for errors.

        Raises:
            ApiError: The URL is not allowed or invalid, or the picture is not readable or too large (status 400).
        """
        try:
            if url.is_data or not url.is_https or not self._limits.hosts:
                return await self._decoders.run(self._decode, self._reader(url))
            async with self._fetches:
                fetched = [await self._fetcher.fetch(url.text())]
                return await self._decoders.run(self._decode, fetched.pop)
        except ImageError as error:
            raise ApiError(400, error.message, param, error.reason.value) from None

    def close(self) -> None:
        """Let the threads end after their picture."""
        self._decoders.close()

    def _reader(self, given: PictureUrl) -> Callable[[], bytes]:
        """Return a function that returns the encoded picture, to be called in a thread."""
        limits = self._limits
        if given.is_data:
            return lambda: decode_data_url(given.take(), limits.max_bytes)
        url = given.text()
        scheme = _SCHEME.match(url)
        name = scheme[1].lower() if scheme else "file"
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
        encoded, decoded = read(), None
        if is_large := len(encoded) > TRIMMED_BYTES:
            return_free_memory()  # that of the request's body
        digest = hashlib.sha256(encoded).hexdigest()
        try:
            decoded = decode(encoded, self._limits.max_pixels)
            del encoded
            is_large |= decoded.image.width * decoded.image.height > TRIMMED_BYTES
            return LoadedImage(decoded.crops(), digest)
        except FusionError as error:
            raise ImageError(Reason.INVALID_IMAGE, str(error)) from None
        finally:
            decoded = None
            if is_large:
                return_free_memory()
