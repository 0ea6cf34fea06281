"""From an image to the crops of the vision encoder."""

from __future__ import annotations

from fusion_edge.runtime.images.preprocessing import load_image

__all__ = ["load_image"]
