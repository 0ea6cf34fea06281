"""Runner for a model folder of onnxruntime-genai."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.peers.runners import llm
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Settings, import_engine, report


class GenaiLlm:
    """Model in ``folder``."""

    def __init__(self, folder: Path, work: llm.LlmWorkload, settings: Settings) -> None:
        genai: Any = import_engine("onnxruntime_genai", "onnxruntime-genai")
        self._numpy: Any = import_engine("numpy", "numpy")
        if work.isa is not None:
            raise CannotRunError("onnxruntime-genai cannot be held to an instruction set; leave out --genai or --isa.")
        llm.expect_file(folder, "genai_config.json", "onnxruntime-genai's model builder")
        # Its default number of threads is slower.
        self.settings = {"intra_op_num_threads": work.threads, **settings}
        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": self.settings}}}))
        model = genai.Model(config)
        parameters = genai.GeneratorParams(model)
        # Random weights may choose an end token, which would stop the run; min_length forbids it.
        parameters.set_search_options(do_sample=False, max_length=work.capacity, min_length=work.capacity)
        self._generator: Any = genai.Generator(model, parameters)

    def prefill(self, ids: list[int]) -> None:
        self._generator.rewind_to(0)
        self._generator.append_tokens(self._numpy.array([ids], self._numpy.int32))  # computes the logits of the prompt
        self._generator.generate_next_token()  # only chooses from them

    def step(self) -> None:
        self._generator.generate_next_token()


if __name__ == "__main__":
    packages = ("onnxruntime", "onnxruntime-genai")
    sys.exit(report(functools.partial(llm.measure, GenaiLlm), llm.LlmWorkload, packages))
