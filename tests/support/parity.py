"""Parity of a bundle on ONNX Runtime with the eager interpreter on the bundle's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.logits import first_logits

from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.bundle.reader import open_bundle


def assert_computes_its_weights(bundle: Path, picture: Path, question: str = "How many?") -> None:
    """Assert that the first logits of both agree within 0.001 of their standard deviation."""
    with load(bundle) as fusion:
        eager = EagerBackend(fusion.config, BundleWeights(open_bundle(bundle)))
        expected = first_logits(Fusion(fusion.manifest, eager, fusion.tokenizer, eager.embed), picture, question)
        actual = first_logits(fusion, picture, question)
    assert np.abs(actual - expected).max() <= 1e-3 * expected.std()
