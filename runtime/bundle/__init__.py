"""The contract between exporter and runtime: what a bundle holds, and how it is read and checked."""

from __future__ import annotations

from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

__all__ = ["Bundle", "Manifest", "open_bundle"]
