"""Settings of everything that keeps a server safe."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion_edge.runtime.serve.api_keys import ApiKeys
from fusion_edge.runtime.serve.images.limits import ImageLimits
from fusion_edge.runtime.serve.limits import RequestLimits


@dataclass(frozen=True)
class SafetySettings:
    """Picklable, so that every replica of a server has the same. The defaults are for one that binds 127.0.0.1."""

    keys: ApiKeys | None = None
    """``None`` lets everybody ask who reaches the server."""
    origins: tuple[str, ...] = ()
    """Exact origins of web pages that may ask."""
    requests: RequestLimits = field(default_factory=RequestLimits)
    images: ImageLimits = field(default_factory=ImageLimits)
