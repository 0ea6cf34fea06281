"""Runner for the vision encoder of a bundle on ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fusion_edge.benchmarks.peers.runners import vision
from fusion_edge.benchmarks.peers.runners.bundle_tier import choose_tier
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Measurement, Settings, report
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.backends.onnxruntime.graph import Graph
from fusion_edge.runtime.bundle.graphs import VISION_ENCODER
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import FusionError


class BundleEncoder:
    """Vision encoder of the bundle in ``folder``; the other graphs are not loaded."""

    def __init__(self, folder: Path, work: vision.VisionWorkload, settings: Settings) -> None:
        bundle = open_bundle(folder)
        model, weights = bundle.manifest.model, bundle.manifest.weights
        formats = sorted({stored for name, stored in weights.items() if name.startswith("vision.layers.")})
        tier = choose_tier(bundle.manifest, VISION_ENCODER, work.isa)
        self.settings: Settings = {"formats": formats, "tier": tier, "threads": work.threads, **settings}
        self.hidden_size = model.language.hidden_size
        self._patches = model.vision.patches
        self._graph = Graph(bundle, VISION_ENCODER, "cpu", work.threads)

    def encode_global(self, pixels: Floats) -> Floats:
        return self.encode_local(pixels, np.zeros((len(pixels), 0, self.hidden_size), np.float32))

    def encode_local(self, pixels: Floats, text: Floats) -> Floats:
        inputs = {"pixel_values": pixels, "text_embeds": text, "text_mask": np.ones(text.shape[:2], np.bool_)}
        shape = (len(pixels), self._patches, self.hidden_size)
        return np.asarray(self._graph.run(inputs, {"features": shape})["features"])


def measure(folder: Path, work: vision.VisionWorkload, settings: Settings) -> Measurement:
    """Measure a bundle. Raises :class:`CannotRunError` for a folder that is no bundle for this machine."""
    try:
        return vision.measure(BundleEncoder, folder, work, settings)
    except FusionError as error:
        raise CannotRunError(str(error)) from None


if __name__ == "__main__":
    sys.exit(report(measure, vision.VisionWorkload, ("fusion-edge", "onnxruntime")))
