"""Pictures of requests: from a URL to crops, with a cache of the latest ones."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fusion_edge.runtime.requests import Crops
from fusion_edge.runtime.serve.images.source import ImageSource
from fusion_edge.runtime.serve.picture_url import PictureUrl
from fusion_edge.runtime.serve.workers import Workers

CACHED_CROPS = 16
"""Limit of cached crops, 2.2 MB each."""

_THREADS = 2
_SMALL_URL = 512 << 10
"""Characters whose digest takes less than a millisecond."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a request."""

    crops: Crops
    digest: str
    """Equal for equal content."""


class Pictures:
    """Loads pictures, in threads, and keeps the crops of the latest ones. For one event loop.

    Close it after the last request.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._workers = Workers(_THREADS, "digest")
        self._latest: OrderedDict[str, Crops] = OrderedDict()
        """By digest, least recently used first."""

    async def load(self, url: PictureUrl, param: str) -> Picture:
        """Return the picture of a URL, which is taken. Raise :class:`ApiError` about the field ``param``."""
        digest = None
        if url.is_data:
            digest = url.digest() if len(url) <= _SMALL_URL else await self._workers.run(url.digest)
            if (found := self._find(digest)) is not None:
                url.take()
                return found
        loaded = await self._source.load(url, param)
        digest = digest or loaded.digest
        found = self._find(digest)
        if found is None:
            crops = Crops(loaded.crops)
            self._latest[digest] = crops
            if len(self._latest) > CACHED_CROPS:
                self._latest.popitem(last=False)
            found = Picture(crops, digest)
        return found

    def close(self) -> None:
        """Let the threads end after their digest. The source stays open."""
        self._workers.close()

    def _find(self, digest: str) -> Picture | None:
        if digest not in self._latest:
            return None
        self._latest.move_to_end(digest)
        return Picture(self._latest[digest], digest)
