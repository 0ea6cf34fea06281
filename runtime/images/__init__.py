"""From a picture to the crops that the vision encoder takes."""

from __future__ import annotations

from fusion_edge.runtime.images.preprocessing import load_image

__all__ = ["load_image"]
