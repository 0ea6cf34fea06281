"""Runner for the LLM of a bundle, without vision encoder and alignment decoder, which other engines do not have."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fusion_edge.benchmarks.peers.runners import llm
from fusion_edge.benchmarks.peers.runners.bundle_tier import choose_tier
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Measurement, Settings, report
from fusion_edge.runtime.backends.onnxruntime.graph import Graph, Input
from fusion_edge.runtime.backends.onnxruntime.llm import LlmSession
from fusion_edge.runtime.bundle.graphs import LLM
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.tokenization.embeddings import Embeddings


class BundleLlm:
    """LLM of the bundle in ``folder``."""

    def __init__(self, folder: Path, work: llm.LlmWorkload, settings: Settings) -> None:
        bundle = open_bundle(folder)
        model = bundle.manifest.model
        if work.capacity > bundle.manifest.max_context:
            raise CannotRunError(
                f"--capacity {work.capacity} exceeds the context of {folder} ({bundle.manifest.max_context} tokens); "
                "pass less, or export with a larger --max-context."
            )
        self.settings: Settings = {
            "precision": bundle.manifest.precision,
            "tier": choose_tier(bundle.manifest, LLM, work.isa),
            "threads": work.threads,
            **settings,
        }
        self._capacity = work.capacity
        self._decoder = LlmSession(Graph(bundle, LLM, "cpu", work.threads), bundle.manifest)
        self._embed = Embeddings(bundle)
        shape = (model.alignment.layers, 0, model.alignment.window_size**2, model.language.hidden_size)
        self._no_windows = np.zeros(shape, np.float32)
        self._token = 0

    def prefill(self, ids: list[int]) -> None:
        inputs: dict[str, Input] = {
            "embeddings": self._embed(np.array(ids))[None],
            "latent_positions": np.zeros((0, 0), np.int64),
            "question_positions": np.zeros(0, np.int64),
            "keys": self._no_windows,
            "values": self._no_windows,
        }
        logits = self._decoder.prefill(inputs, len(ids), self._capacity)
        self._token = int(logits.argmax())

    def step(self) -> None:
        self._token = int(self._decoder.decode(self._embed(np.array([self._token]))[0]).argmax())


def measure(folder: Path, work: llm.LlmWorkload, settings: Settings) -> Measurement:
    """Measure a bundle. Raises :class:`CannotRunError` for a folder that is no bundle for this machine."""
    try:
        return llm.measure(BundleLlm, folder, work, settings)
    except FusionError as error:
        raise CannotRunError(str(error)) from None


if __name__ == "__main__":
    sys.exit(report(measure, llm.LlmWorkload, ("fusion-edge", "onnxruntime")))
