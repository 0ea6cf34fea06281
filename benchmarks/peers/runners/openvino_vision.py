"""Runner: a vision encoder that ``vision_peer_models.py`` made for OpenVINO."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.peers.runners import vision
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, answer, peer


class OpenVinoEncoder:
    """The models ``global.xml`` and ``local.xml`` beside ``properties``, a JSON file of OpenVINO's own properties.

    Shapes are fixed before compilation: dynamic ones cost time, and fusions of attention.
    """

    def __init__(self, properties: Path, work: vision.Workload) -> None:
        openvino: Any = peer("openvino", "openvino")
        self._numpy: Any = peer("numpy", "numpy")
        try:
            chosen = json.loads(properties.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CannotRunError(
                f"{properties} cannot be read ({error}); expected a file of properties, such as bf16.json, in a "
                "folder that vision_peer_models.py wrote."
            ) from None
        # One image at a time on all cores: latency, not throughput.
        self.settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": work.threads, **chosen}
        core = openvino.Core()
        text = self._model(core, properties.with_name("local.xml"))
        self.hidden_size = text.input("text").partial_shape[2].get_length()
        text.reshape({"text": [1, work.question_tokens, self.hidden_size], "mask": [1, work.question_tokens]})
        plain = self._model(core, properties.with_name("global.xml"))
        plain.reshape({"pixels": [work.crops, 3, vision.IMAGE_SIZE, vision.IMAGE_SIZE]})
        self._local, self._global = (
            core.compile_model(model, "CPU", self.settings).create_infer_request() for model in (text, plain)
        )

    def _model(self, core: Any, path: Path) -> Any:
        if not path.is_file():
            raise CannotRunError(f"{path} is missing; expected a folder that vision_peer_models.py wrote.")
        return core.read_model(path)

    def encode_global(self, pixels: Any) -> Any:
        return self._run(self._global, {"pixels": pixels})

    def encode_local(self, pixels: Any, text: Any) -> Any:
        mask = self._numpy.ones(text.shape[:2], bool)
        return self._run(self._local, {"pixels": pixels, "text": text, "mask": mask})

    def _run(self, request: Any, inputs: Any) -> Any:
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]


if __name__ == "__main__":
    sys.exit(answer(functools.partial(vision.measure, OpenVinoEncoder), vision.Workload, ("openvino", "nncf")))
