"""The contract between exporter and runtime: the schema of a bundle, and the reader that checks it."""

from __future__ import annotations

from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

__all__ = ["Bundle", "Manifest", "open_bundle"]
