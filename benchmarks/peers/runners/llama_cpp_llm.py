"""Runner for a GGUF file in llama.cpp, through the C API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.peers.runners import llm
from fusion_edge.benchmarks.peers.runners.instruction_sets import INSTRUCTION_SETS
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Settings, import_engine, report

ERROR = 4  # ggml_log_level


def _log_errors(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log_errors)


class LlamaCppLlm:
    """Model in ``file``."""

    def __init__(self, file: Path, work: llm.LlmWorkload, settings: Settings) -> None:
        self._llama: Any = import_engine("llama_cpp", "llama-cpp-python")
        llama = self._llama
        if not file.is_file():
            raise CannotRunError(f"{file} is not a file; expected a GGUF file such as export_llm.py writes.")
        llama.llama_log_set(_LOG, None)
        if work.isa is not None:
            _expect_build(llama.llama_print_system_info().decode(), work.isa)
        context = {
            "n_ctx": work.capacity,
            "n_batch": max(work.prompt, llm.WARM_UP),  # maximum tokens per call
            "n_threads": work.threads,
            "n_threads_batch": work.threads,
            "type_k": llama.GGML_TYPE_F16,
            "type_v": llama.GGML_TYPE_F16,
            **settings,
        }
        # Weights are repacked while loading: mapped file pages would count twice.
        loading = {"load_mode": llama.LLAMA_LOAD_MODE_NONE}
        self.settings = {**context, **loading}
        model = llama.llama_model_load_from_file(
            str(file).encode(), _filled(llama.llama_model_default_params(), loading)
        )
        parameters = _filled(llama.llama_context_default_params(), context)
        self._context = model and llama.llama_init_from_model(model, parameters)
        if not self._context:
            raise CannotRunError(f"llama.cpp cannot load {file}; see its output above.")
        self._sampler = llama.llama_sampler_init_greedy()
        self._token = 0

    def prefill(self, ids: list[int]) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        self._run(ids)

    def step(self) -> None:
        self._run([self._token])

    def _run(self, ids: list[int]) -> None:
        tokens = (self._llama.llama_token * len(ids))(*ids)
        if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(ids))):
            raise CannotRunError("llama.cpp failed to run the model; see its output above.")
        self._token = self._llama.llama_sampler_sample(self._sampler, self._context, -1)


def _expect_build(system: str, isa: str) -> None:
    """Raise :class:`CannotRunError` if llama.cpp, whose instruction sets are fixed when it is built, has others."""
    chosen = INSTRUCTION_SETS[isa]
    features = {part.split("=")[0].split()[-1] for part in system.split("|") if "= 1" in part}
    newer = {feature for feature in features if feature.startswith(chosen.newer)}
    if chosen.feature not in features or newer:
        has = ", ".join(sorted(newer)) or f"no {chosen.feature}"
        raise CannotRunError(
            f"This llama.cpp has {has}; build one for {isa} with GGML_NATIVE=OFF (docs/benchmarks.md), and name its "
            "environment with --python."
        )


def _filled(structure: Any, fields: Mapping[str, Any]) -> Any:
    """Set fields of a C structure. Raises :class:`CannotRunError` for unknown names, which ctypes would accept."""
    known = {name for name, *_ in structure._fields_}
    for name, value in fields.items():
        if name not in known:
            raise CannotRunError(f"This llama-cpp-python has no field {name}; install 0.3.36.")
        setattr(structure, name, value)
    return structure


if __name__ == "__main__":
    sys.exit(report(functools.partial(llm.measure, LlamaCppLlm), llm.LlmWorkload, ("llama-cpp-python",)))
