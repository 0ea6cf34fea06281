"""Where a bundle will run, and presets: the options that a device asks for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_edge.runtime.bundle.config import FusionConfig

if TYPE_CHECKING:
    from fusion_edge.export.planning.plan import ExportOptions

ACTIVATIONS = {"cpu": "float32", "cuda": "float16", "tensorrt": "float16"}
"""numpy dtype name of what flows between the graphs, by target."""


@dataclass(frozen=True)
class Preset:
    """Options of ``fusion-export`` for one kind of device; each is overridden by the option itself."""

    memory: int
    """Bytes that the device has for a bundle: what its system and a camera's driver leave."""
    max_context: int | None = None
    """At most so many positions; None: as many as the checkpoint was trained with."""
    image_tokens: int | None = None
    """At most so many; None: all."""
    vision: str = "fp16"
    """What the vision encoder is without calibration; with it, integers throughout."""
    precision: str = "int4"
    group_size: int = 128
    target: str = "tensorrt"


PRESETS = {
    # 8 GB that CPU and GPU share, 102 GB/s: every position of the cache and every image token counts.
    "jetson-orin-nano": Preset(memory=6_500_000_000, max_context=1536, image_tokens=256, vision="int8-weights"),
    "jetson-orin": Preset(memory=28_000_000_000),  # the AGX with 32 GB
    "jetson-thor": Preset(memory=110_000_000_000),
    "rtx": Preset(memory=7_000_000_000),  # GPUs of 8 GB and more
}


def with_preset(options: ExportOptions, config: FusionConfig) -> ExportOptions:
    """``options``, what is left open filled in from the preset, within what the checkpoint has."""
    if options.preset is None:
        return dataclasses.replace(options, precision=options.precision or "int4")
    preset = PRESETS[options.preset]
    vision = None if options.is_calibrated else preset.vision
    return dataclasses.replace(
        options,
        precision=options.precision or preset.precision,
        group_size=preset.group_size if options.group_size is None else options.group_size,
        max_context=options.max_context or min(preset.max_context or config.max_length, config.max_length),
        image_tokens=options.image_tokens or _at_most(preset.image_tokens, config.vision.patches),
        vision=options.vision or (vision if options.precision not in ("fp16", "fp32") else None),
    )


def _at_most(tokens: int | None, patches: int) -> int | None:
    return None if tokens is None or tokens > patches else tokens
