"""Runner for a stateful OpenVINO model, as optimum-intel writes it, in OpenVINO's runtime."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.peers.runners import llm
from fusion_edge.benchmarks.peers.runners.worker import Settings, import_engine, report

MODEL = "openvino_model.xml"


class OpenvinoLlm:
    """Model in ``folder``."""

    def __init__(self, folder: Path, work: llm.LlmWorkload, settings: Settings) -> None:
        openvino: Any = import_engine("openvino", "openvino")
        self._numpy: Any = import_engine("numpy", "numpy")
        llm.expect_file(folder, MODEL, "optimum-intel")
        self.settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": work.threads,
            "KV_CACHE_PRECISION": "u8",  # the smallest cache
            **settings,
        }
        core = openvino.Core()
        graph = core.read_model(folder / MODEL)
        _keep_last_row(openvino, self._numpy, graph)
        self._request = core.compile_model(graph, "CPU", self.settings).create_infer_request()
        self._beam = self._numpy.zeros(1, self._numpy.int32)
        self._cached = 0
        self._token = 0

    def prefill(self, ids: list[int]) -> None:
        self._request.reset_state()
        self._cached = 0
        self._run(ids)

    def step(self) -> None:
        self._run([self._token])

    def _run(self, ids: list[int]) -> None:
        first, self._cached = self._cached, self._cached + len(ids)
        integers = self._numpy.int64
        inputs = {
            "input_ids": self._numpy.array([ids], integers),
            "attention_mask": self._numpy.ones((1, self._cached), integers),
            "position_ids": self._numpy.arange(first, self._cached, dtype=integers)[None],
            "beam_idx": self._beam,
        }
        self._request.infer(inputs, share_inputs=True)
        self._token = int(self._request.get_tensor("logits").data[0, -1].argmax())


def _keep_last_row(openvino: Any, numpy: Any, model: Any) -> None:
    """Keep only the last row of ``lm_head``'s input, because a prefill needs no other logits.

    OpenVINO GenAI does the same, but its pipeline needs a tokenizer.
    """
    operators = openvino.opset13
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":  # skip conversions of its output
        node = node.input_value(0).get_node()
    start, stop, step, axis = (numpy.array([value], numpy.int64) for value in (-1, 2**31 - 1, 1, 1))
    rows = operators.slice(node.input_value(0), start, stop, step, axis)
    node.input(0).replace_source_output(rows.output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    sys.exit(report(functools.partial(llm.measure, OpenvinoLlm), llm.LlmWorkload, ("openvino",)))
