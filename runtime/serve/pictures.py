"""Pictures of requests: from a URL to crops, with a cache of the latest ones."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.requests import Crops
from fusion_edge.runtime.serve.images.data_url import is_data_url
from fusion_edge.runtime.serve.images.source import ImageSource
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
    """Loads pictures and cuts them, in threads, and keeps the crops of the latest ones. For one event loop.

    Close it after the last request.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._workers = Workers(_THREADS, "crops")
        self._latest: OrderedDict[str, Crops] = OrderedDict()
        """By digest, least recently used first."""

    async def load(self, url: str, param: str) -> Picture:
        """Return the picture of a URL. Raise :class:`ApiError` about the field ``param``."""
        is_content = is_data_url(url)
        if is_content:
            digest = _digest(url) if len(url) <= _SMALL_URL else await self._workers.run(_digest, url)
            if (found := self._find(digest)) is not None:
                return found
        loaded = await self._source.load(url, param)
        digest = digest if is_content else loaded.digest
        found = self._find(digest)
        if found is None:
            crops = Crops(await self._workers.run(cut_crops, loaded.image))
            self._latest[digest] = crops
            if len(self._latest) > CACHED_CROPS:
                self._latest.popitem(last=False)
            found = Picture(crops, digest)
        return found

    def close(self) -> None:
        """Let the threads end after their picture. The source stays open."""
        self._workers.close()

    def _find(self, digest: str) -> Picture | None:
        if digest not in self._latest:
            return None
        self._latest.move_to_end(digest)
        return Picture(self._latest[digest], digest)


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
