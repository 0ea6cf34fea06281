"""Presets: default options for a kind of device (values of ``--target``), and levels of detail (``--detail``)."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.export.planning.targets.target import Target
from fusion_edge.export.planning.targets.tensorrt import TENSORRT


@dataclass(frozen=True)
class Preset:
    """Defaults for one kind of device. Options on the command line override them."""

    memory: int
    """Bytes available to a bundle: the device's memory without its system and a camera's driver."""
    bandwidth: float | None = None
    """Bytes per second of the memory, from NVIDIA's product pages; None if the devices of the preset differ."""
    max_context: int | None = None
    """Upper limit in tokens; None: the checkpoint's context length."""
    image_tokens: int | None = None
    """Upper limit; None: all."""
    target: Target = TENSORRT


RTX = Preset(memory=7_000_000_000)
"""Desktop GPUs: the smallest have 8 GB."""
PRESETS = {
    # 8 GB shared by CPU and GPU, 102 GB/s: the KV cache and the image tokens decide memory and time.
    "jetson-orin-nano": Preset(memory=6_500_000_000, bandwidth=102e9, max_context=1536, image_tokens=256),
    "jetson-orin": Preset(memory=28_000_000_000, bandwidth=204.8e9),  # AGX with 32 GB
    "jetson-thor": Preset(memory=110_000_000_000, bandwidth=273e9),
    "rtx": RTX,
    # Blackwell: FP8 and NVFP4 measured less exact than INT8 and INT4, and no smaller (docs/tensorrt.md).
    "rtx-50": RTX,
}


@dataclass(frozen=True)
class Detail:
    """How much of a picture the LLM sees: FUSION-L."""

    image_tokens: int | None
    """None: all."""
    latents: int


DETAILS = {"full": Detail(None, 144), "balanced": Detail(256, 64), "fast": Detail(144, 16)}
