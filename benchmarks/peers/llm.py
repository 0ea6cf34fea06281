"""The LLM of a bundle against that of other engines: prefill, decode, memory (see ``peers.py``)."""

from __future__ import annotations

from typing import Any

from fusion_edge.benchmarks.peers.harness import Column, Comparison, Runner
from fusion_edge.benchmarks.peers.runners.llm import Workload
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.formatting import format_bytes

RUNNERS = "fusion_edge.benchmarks.peers.runners"


def workload(**sizes: Any) -> Workload:
    """Raises :class:`UsageError` for sizes that do not fit each other."""
    work = Workload(**sizes)
    if not work.fits():
        raise UsageError(
            f"--context {work.context} does not fit: expected at least --prompt plus half of --steps "
            f"({work.prompt + work.steps // 2}), and --context plus --steps at most --capacity ({work.capacity})."
        )
    return work


COMPARISON = Comparison(
    description="the LLM of a bundle, run without latents, as peers have none",
    runners={
        "bundle": Runner(f"{RUNNERS}.bundle_llm", "folder that fusion-export wrote"),
        "genai": Runner(f"{RUNNERS}.genai_llm", "folder that onnxruntime-genai's builder wrote"),
        "llama-cpp": Runner(f"{RUNNERS}.llama_cpp_llm", "GGUF file"),
        "openvino": Runner(f"{RUNNERS}.openvino_llm", "folder that optimum-intel wrote"),
    },
    workload=workload,
    columns=(
        Column("prefill", "prefill_seconds", lambda seconds: f"{seconds:.2f} s"),
        Column("decode", "decode_tokens_per_second", lambda rate: f"{rate:.2f} tokens/s", is_more_better=True),
        Column("memory", "memory", format_bytes),
        Column("peak", "peak_memory", format_bytes),
        Column("load", "load_seconds", lambda seconds: f"{seconds:.1f} s"),
    ),
)
