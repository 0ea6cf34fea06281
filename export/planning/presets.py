"""Presets: options of an export that suit a device. Its name is a value of ``--target``."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.export.planning.targets.target import Target
from fusion_edge.export.planning.targets.tensorrt import TENSORRT


@dataclass(frozen=True)
class Preset:
    """Defaults for one kind of device. An option on the command line overrides each."""

    memory: int
    """Bytes that the device has for a bundle: what its system and a camera's driver leave."""
    max_context: int | None = None
    """Upper limit in tokens; None: as many as the checkpoint was trained with."""
    image_tokens: int | None = None
    """Upper limit; None: all."""
    vision: str = "fp16"
    """Vision encoder of an export without calibration."""
    target: Target = TENSORRT


PRESETS = {
    # 8 GB shared by CPU and GPU, 102 GB/s: the KV cache and the image tokens decide memory and time.
    "jetson-orin-nano": Preset(memory=6_500_000_000, max_context=1536, image_tokens=256, vision="int8-weights"),
    "jetson-orin": Preset(memory=28_000_000_000),  # AGX with 32 GB
    "jetson-thor": Preset(memory=110_000_000_000),
    "rtx": Preset(memory=7_000_000_000),  # GPUs with 8 GB or more
}
