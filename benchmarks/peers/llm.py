"""Comparison of LLMs: prefill, decode, memory."""

from __future__ import annotations

from typing import Any

from fusion_edge.benchmarks.peers.harness import Column, PeerComparison, Runner
from fusion_edge.benchmarks.peers.runners.llm import LlmWorkload
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.formatting import format_bytes

RUNNERS = "fusion_edge.benchmarks.peers.runners"


def workload(**sizes: Any) -> LlmWorkload:
    """Check a workload. Raises :class:`UsageError` for sizes that contradict each other."""
    work = LlmWorkload(**sizes)
    if not work.fits():
        raise UsageError(
            f"--context {work.context} does not fit; expected at least --prompt plus half of --steps "
            f"({work.prompt + work.steps // 2}), and --context plus --steps at most --capacity ({work.capacity})."
        )
    return work


COMPARISON = PeerComparison(
    description="LLM of a bundle against other engines, without latents, which the others do not have",
    runners={
        "bundle": Runner(f"{RUNNERS}.bundle_llm", "bundle folder written by fusion-export"),
        "genai": Runner(f"{RUNNERS}.genai_llm", "folder written by onnxruntime-genai's model builder"),
        "llama-cpp": Runner(f"{RUNNERS}.llama_cpp_llm", "GGUF file"),
        "openvino": Runner(
            f"{RUNNERS}.openvino_llm", "folder written by optimum-intel, or a JSON file of properties in it"
        ),
    },
    workload=workload,
    columns=(
        Column("prefill", "prefill_seconds", lambda seconds: f"{seconds:.2f} s"),
        Column("decode", "decode_tokens_per_second", lambda rate: f"{rate:.2f} tokens/s", higher_is_better=True),
        Column("memory", "memory", format_bytes),
        Column("peak", "peak_memory", format_bytes),
        Column("load", "load_seconds", lambda seconds: f"{seconds:.1f} s"),
    ),
)
