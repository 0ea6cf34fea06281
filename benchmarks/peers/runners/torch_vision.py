"""Runner for the vision encoder of a checkpoint in PyTorch, bfloat16, with the eager interpreter's functions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from fusion_edge.benchmarks.peers.runners import vision
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Measurement, report
from fusion_edge.benchmarks.vision_module import GlobalCrops, LocalCrop, read_vision
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.errors import FusionError

DTYPE = torch.bfloat16  # the weights' stored type, and the CPU's fastest float GEMM


class TorchEncoder:
    """Vision encoder of the checkpoint in ``folder``."""

    def __init__(self, folder: Path, work: vision.VisionWorkload) -> None:
        torch.set_num_threads(work.threads)
        config, parameters = read_vision(folder, DTYPE)
        self.settings = {"dtype": str(DTYPE), "threads": work.threads}
        self.hidden_size = config.language.hidden_size
        self._global, self._local = GlobalCrops(config, parameters), LocalCrop(config, parameters)

    @torch.inference_mode()
    def encode_global(self, pixels: Floats) -> Floats:
        features: Floats = self._global(torch.from_numpy(pixels).to(DTYPE)).float().numpy()
        return features

    @torch.inference_mode()
    def encode_local(self, pixels: Floats, text: Floats) -> Floats:
        inputs = (torch.from_numpy(array).to(DTYPE) for array in (pixels, text))
        mask = torch.from_numpy(np.ones(text.shape[:2], np.bool_))
        features: Floats = self._local(*inputs, mask).float().numpy()
        return features


def measure(folder: Path, work: vision.VisionWorkload) -> Measurement:
    """Measure a checkpoint. Raises :class:`CannotRunError` for a folder that is no checkpoint."""
    try:
        return vision.measure(TorchEncoder, folder, work)
    except FusionError as error:
        raise CannotRunError(str(error)) from None


if __name__ == "__main__":
    sys.exit(report(measure, vision.VisionWorkload, ("torch",)))
