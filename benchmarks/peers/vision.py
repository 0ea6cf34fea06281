"""Comparison of vision encoders: one image and one question."""

from __future__ import annotations

from fusion_edge.benchmarks.peers.harness import Column, PeerComparison, Runner
from fusion_edge.benchmarks.peers.runners.vision import VisionWorkload
from fusion_edge.runtime.formatting import format_bytes

RUNNERS = "fusion_edge.benchmarks.peers.runners"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


COMPARISON = PeerComparison(
    description="vision encoder: the global crops of an image without text, then the local crop with a question",
    runners={
        "bundle": Runner(f"{RUNNERS}.bundle_vision", "bundle folder written by fusion-export"),
        "torch": Runner(f"{RUNNERS}.torch_vision", "checkpoint folder, run in bfloat16"),
        "openvino": Runner(f"{RUNNERS}.openvino_vision", "properties file (f32.json) in a folder of export_vision.py"),
    },
    workload=VisionWorkload,
    columns=(
        Column("global crops", "global_seconds", _seconds),
        Column("local crop", "local_seconds", _seconds),
        Column("both", "image_seconds", _seconds),
        Column("memory", "memory", format_bytes),
        Column("peak", "peak_memory", format_bytes),
        Column("load", "load_seconds", lambda seconds: f"{seconds:.1f} s"),
    ),
)
