"""Comparison of vision encoders: one image and one question."""

from __future__ import annotations

from fusion_edge.benchmarks.peers.harness import Column, PeerComparison, Runner
from fusion_edge.benchmarks.peers.runners.vision import VisionWorkload
from fusion_edge.runtime.formatting import format_bytes

RUNNERS = "fusion_edge.benchmarks.peers.runners"
PYTORCH = {dtype: {"dtype": dtype} for dtype in ("bf16", "f32")}
OPENVINO = {precision: {"INFERENCE_PRECISION_HINT": precision} for precision in ("bf16", "f32")}


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


COMPARISON = PeerComparison(
    description="vision encoder: the global crops of an image without text, then the local crop with a question",
    runners={
        "bundle": Runner(f"{RUNNERS}.bundle_vision", "bundle folder written by fusion-export"),
        "torch": Runner(f"{RUNNERS}.torch_vision", "checkpoint folder", PYTORCH),
        "openvino": Runner(f"{RUNNERS}.openvino_vision", "folder written by export_vision.py", OPENVINO),
    },
    workload=VisionWorkload,
    columns=(
        Column("global crops", "global_seconds", _seconds),
        Column("local crop", "local_seconds", _seconds),
        Column("both", "image_seconds", _seconds, is_phase=True),
        Column("memory", "memory", format_bytes),
        Column("peak", "peak_memory", format_bytes),
        Column("load", "load_seconds", lambda seconds: f"{seconds:.1f} s"),
    ),
)
