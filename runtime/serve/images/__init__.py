"""Pictures of requests: ``data:`` URLs, and what the operator allows beside them."""

from __future__ import annotations

from fusion_edge.runtime.serve.images.limits import ImageLimits
from fusion_edge.runtime.serve.images.source import ImageSource, LoadedImage

__all__ = ["ImageLimits", "ImageSource", "LoadedImage"]
