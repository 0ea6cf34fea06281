"""Runner: a model folder of onnxruntime-genai."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.peers.runners import llm
from fusion_edge.benchmarks.peers.runners.worker import answer, peer


class GenaiLlm:
    """The model in ``folder``."""

    def __init__(self, folder: Path, work: llm.Workload) -> None:
        genai: Any = peer("onnxruntime_genai", "onnxruntime-genai")
        self._numpy: Any = peer("numpy", "numpy")
        llm.expect_file(folder, "genai_config.json", "onnxruntime-genai's builder")
        # Its own choice of threads is slower here.
        self.settings = {"intra_op_num_threads": work.threads}
        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": self.settings}}}))
        model = genai.Model(config)
        parameters = genai.GeneratorParams(model)
        # Random weights may choose an end token, which would stop the run: none is allowed before min_length.
        parameters.set_search_options(do_sample=False, max_length=work.capacity, min_length=work.capacity)
        self._generator: Any = genai.Generator(model, parameters)

    def prefill(self, ids: list[int]) -> None:
        self._generator.rewind_to(0)
        self._generator.append_tokens(self._numpy.array([ids], self._numpy.int32))  # computes the logits
        self._generator.generate_next_token()  # only chooses from them, as does every first call

    def step(self) -> None:
        self._generator.generate_next_token()


if __name__ == "__main__":
    packages = ("onnxruntime", "onnxruntime-genai")
    sys.exit(answer(functools.partial(llm.measure, GenaiLlm), llm.Workload, packages))
