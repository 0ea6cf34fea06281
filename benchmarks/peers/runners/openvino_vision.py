"""Runner for a vision encoder that ``export_vision.py`` wrote for OpenVINO."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.peers.runners import vision
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Settings, import_engine, report


class OpenVinoEncoder:
    """Models ``global.xml`` and ``local.xml`` in ``folder``.

    Shapes are fixed before compilation: dynamic shapes are slower and prevent attention fusion.
    """

    def __init__(self, folder: Path, work: vision.VisionWorkload, settings: Settings) -> None:
        openvino: Any = import_engine("openvino", "openvino")
        self._numpy: Any = import_engine("numpy", "numpy")
        # Latency of one image on all cores, not throughput.
        self.settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": work.threads, **settings}
        core = openvino.Core()
        text = self._model(core, folder / "local.xml")
        self.hidden_size = text.input("text").partial_shape[2].get_length()
        text.reshape({"text": [1, work.question_tokens, self.hidden_size], "mask": [1, work.question_tokens]})
        plain = self._model(core, folder / "global.xml")
        plain.reshape({"pixels": [work.crops, 3, vision.IMAGE_SIZE, vision.IMAGE_SIZE]})
        self._local, self._global = (
            core.compile_model(model, "CPU", self.settings).create_infer_request() for model in (text, plain)
        )

    def _model(self, core: Any, path: Path) -> Any:
        if not path.is_file():
            raise CannotRunError(f"{path} is missing; expected a folder written by export_vision.py.")
        return core.read_model(path)

    def encode_global(self, pixels: Any) -> Any:
        return self._run(self._global, {"pixels": pixels})

    def encode_local(self, pixels: Any, text: Any) -> Any:
        mask = self._numpy.ones(text.shape[:2], bool)
        return self._run(self._local, {"pixels": pixels, "text": text, "mask": mask})

    def _run(self, request: Any, inputs: Any) -> Any:
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]


if __name__ == "__main__":
    sys.exit(report(functools.partial(vision.measure, OpenVinoEncoder), vision.VisionWorkload, ("openvino", "nncf")))
