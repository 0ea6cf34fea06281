"""Runner for the vision encoder of a checkpoint in PyTorch, with the eager interpreter's functions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from fusion_edge.benchmarks.peers.runners import vision
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Measurement, Settings, report
from fusion_edge.benchmarks.vision_module import GlobalCrops, LocalCrop, read_vision
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.errors import FusionError

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class TorchEncoder:
    """Vision encoder of the checkpoint in ``folder``."""

    def __init__(self, folder: Path, work: vision.VisionWorkload, settings: Settings) -> None:
        torch.set_num_threads(work.threads)
        self._dtype = DTYPES[settings["dtype"]]
        config, parameters = read_vision(folder, self._dtype)
        self.settings = {"threads": work.threads, **settings}
        self.hidden_size = config.language.hidden_size
        self._global, self._local = GlobalCrops(config, parameters), LocalCrop(config, parameters)

    @torch.inference_mode()
    def encode_global(self, pixels: Floats) -> Floats:
        features: Floats = self._global(torch.from_numpy(pixels).to(self._dtype)).float().numpy()
        return features

    @torch.inference_mode()
    def encode_local(self, pixels: Floats, text: Floats) -> Floats:
        inputs = (torch.from_numpy(array).to(self._dtype) for array in (pixels, text))
        mask = torch.from_numpy(np.ones(text.shape[:2], np.bool_))
        features: Floats = self._local(*inputs, mask).float().numpy()
        return features


def measure(folder: Path, work: vision.VisionWorkload, settings: Settings) -> Measurement:
    """Measure a checkpoint. Raises :class:`CannotRunError` for a folder that is no checkpoint."""
    try:
        return vision.measure(TorchEncoder, folder, work, settings)
    except FusionError as error:
        raise CannotRunError(str(error)) from None


if __name__ == "__main__":
    sys.exit(report(measure, vision.VisionWorkload, ("torch",)))
