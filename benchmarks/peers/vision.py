"""The vision encoder of a bundle against that of other engines: one image and one question (see ``peers.py``)."""

from __future__ import annotations

from fusion_edge.benchmarks.peers.harness import Column, Comparison, Runner
from fusion_edge.benchmarks.peers.runners.vision import Workload
from fusion_edge.runtime.formatting import format_bytes

RUNNERS = "fusion_edge.benchmarks.peers.runners"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


COMPARISON = Comparison(
    description="the vision encoder: an image's global crops without text, then its local crop with a question",
    runners={
        "bundle": Runner(f"{RUNNERS}.bundle_vision", "folder that fusion-export wrote"),
        "torch": Runner(f"{RUNNERS}.torch_vision", "folder of a checkpoint, computed in bfloat16"),
        "openvino": Runner(f"{RUNNERS}.openvino_vision", "properties in a folder of vision_peer_models.py: f32.json"),
    },
    workload=Workload,
    columns=(
        Column("global crops", "global_seconds", _seconds),
        Column("local crop", "local_seconds", _seconds),
        Column("both", "image_seconds", _seconds),
        Column("memory", "memory", format_bytes),
        Column("peak", "peak_memory", format_bytes),
        Column("load", "load_seconds", lambda seconds: f"{seconds:.1f} s"),
    ),
)
