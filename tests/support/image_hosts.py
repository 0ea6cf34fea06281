"""A network for fetching pictures that reaches nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fusion_edge.runtime.serve.images.errors import ImageError
from fusion_edge.runtime.serve.images.https import HttpsFetcher, Stream
from fusion_edge.runtime.serve.images.limits import ImageLimits

HOST, OTHER, INNER = "images.example.com", "cdn.example.net", "inner.example.com"
LIMITS = ImageLimits(hosts=(HOST, OTHER, INNER), max_bytes=10_000, fetch_seconds=2)
PUBLIC = "93.184.215.14"


class Network:
    """A resolver and connector that count, and reach no network unless a server is given."""

    def __init__(self, addresses: dict[str, list[str]] | None = None) -> None:
        self.addresses = addresses or {HOST: [PUBLIC], OTHER: [PUBLIC]}
        self.resolved: list[str] = []
        self.connected: list[tuple[str, str]] = []
        self.open: Callable[[str, str], Awaitable[Stream]] | None = None

    async def resolve(self, host: str) -> list[str]:
        self.resolved.append(host)
        if host not in self.addresses:
            raise OSError("unknown host")
        return self.addresses[host]

    async def connect(self, address: str, host: str) -> Stream:
        self.connected.append((address, host))
        if self.open is None:
            raise OSError("no network")
        return await self.open(address, host)

    def fetcher(self, limits: ImageLimits = LIMITS) -> HttpsFetcher:
        return HttpsFetcher(limits, self.resolve, self.connect)


def refused(network: Network, url: str, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        asyncio.run(network.fetcher(limits).fetch(url))
    assert "\n" not in caught.value.message
    return caught.value
