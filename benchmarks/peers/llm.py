"""Comparison of LLMs: prefill, decode, memory."""

from __future__ import annotations

from typing import Any

from fusion_edge.benchmarks.peers.harness import Column, PeerComparison, Runner
from fusion_edge.benchmarks.peers.runners.llm import LlmWorkload
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.formatting import format_bytes

RUNNERS = "fusion_edge.benchmarks.peers.runners"

OPENVINO = {
    f"{precision}, {f'groups of {size}' if size else 'float activations'}": {
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": size,
    }
    for precision in ("bf16", "f32")
    for size in (0, 32, 128)
}
LLAMA_CPP = {
    f"{'flash' if flash else 'plain'} attention, batches of {size}": {"flash_attn_type": flash, "n_ubatch": size}
    for flash in (0, 1)
    for size in (512, 2048)
}


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
        "llama-cpp": Runner(f"{RUNNERS}.llama_cpp_llm", "GGUF file", LLAMA_CPP),
        "openvino": Runner(f"{RUNNERS}.openvino_llm", "folder written by optimum-intel", OPENVINO),
    },
    workload=workload,
    columns=(
        Column("prefill", "prefill_seconds", lambda seconds: f"{seconds:.2f} s", is_phase=True),
        Column(
            "decode",
            "decode_tokens_per_second",
            lambda rate: f"{rate:.2f} tokens/s",
            higher_is_better=True,
            is_phase=True,
        ),
        Column("memory", "memory", format_bytes),
        Column("peak", "peak_memory", format_bytes),
        Column("load", "load_seconds", lambda seconds: f"{seconds:.1f} s"),
    ),
)
