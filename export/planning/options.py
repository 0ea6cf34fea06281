"""Options of an export, as the user gives them. Each field is an option of ``fusion-export``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from fusion_edge.export.planning.arguments import choice, option, switch
from fusion_edge.export.planning.presets import DETAILS, PRESETS
from fusion_edge.export.planning.rules import VISION, Rule
from fusion_edge.export.planning.targets import TARGETS
from fusion_edge.quant.formats import group_sizes
from fusion_edge.runtime.cli.options import integer_list, positive_integer

PRECISION, SHAPES, TARGET = "precision", "shapes", "target"
"""Groups of options in ``--help``."""


def _group_size(text: str) -> int:
    """argparse type of ``--group-size``."""
    if text not in group_sizes():
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(group_sizes())}")
    return group_sizes()[text]


def _kv_cache(text: str) -> str:
    """argparse type of ``--kv-cache``: says why there is no FP8."""
    if text == "fp8":
        raise argparse.ArgumentTypeError(
            "no runtime here has a cache in fp8; int8, for cpu and tensorrt, has codes of the same size and needs no "
            "FP8 hardware (docs/tensorrt.md): use --kv-cache int8"
        )
    return text


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export. None leaves the choice to the target, the preset or the model."""

    precision: str = choice(
        {
            "int4": "4-bit LLM and alignment; 8-bit vision, lm_head and embeddings; tensorrt: 16-bit lm_head, and "
            "16-bit vision without --calibrate (default)",
            "nf4": "like --int4, with bitsandbytes' NF4: more accurate, much slower on a CPU",
            "int8": "8-bit weights throughout",
            "fp16": "16-bit weights",
            "fp32": "32-bit weights: the reference",
        },
        group=PRECISION,
        default="int4",
    )
    group_size: int | None = option(
        "--group-size",
        "input channels that share a scale; channel: all of a row (default: 128; NF4 and FP4: 64)",
        group=PRECISION,
        type=_group_size,
        metavar="{" + ",".join(group_sizes()) + "}",
    )
    asymmetric: bool = switch(
        "--asym", "4-bit weights with zero points: more accurate, slower by a few percent", group=PRECISION
    )
    vision: str | None = option(
        "--vision",
        "vision encoder: 8-bit weights and activations (int8, needs --calibrate), 8-bit weights only, or 16 bits "
        "(default: int8 with --calibrate for cpu and tensorrt, else fp16 for tensorrt and int8-weights for others)",
        group=PRECISION,
        choices=VISION,
    )
    rules: tuple[Rule, ...] = ()
    """Rules that precede those of ``precision``; the first match wins."""
    query_lengths: tuple[int, ...] = option(
        "--query-len",
        "query lengths to offer, the default first (default: all of the checkpoint, 144 first)",
        group=SHAPES,
        default=(),
        type=integer_list,
        metavar="N[,N...]",
    )
    image_tokens: int | None = option(
        "--image-tokens",
        "FUSION-L: resize the grid of image tokens to this square number, e.g. 256 (default: all)",
        group=SHAPES,
        type=positive_integer,
        metavar="N",
    )
    detail: str | None = option(
        "--detail",
        "FUSION-L by level: all image tokens with 144 latents, 256 with 64, or 144 with 16; in place of --image-tokens "
        "and --query-len",
        group=SHAPES,
        choices=tuple(DETAILS),
    )
    max_context: int | None = option(
        "--max-context",
        "tokens that the KV cache holds, prompt and answer together (default: the checkpoint's context length)",
        group=SHAPES,
        type=positive_integer,
        metavar="N",
    )
    target: str = option(
        "--target",
        "runtime of the bundle, or a device: tensorrt with options that suit it (default: {default})",
        group=TARGET,
        default=next(iter(TARGETS)),
        choices=[*TARGETS, *PRESETS],
    )
    accuracy_level: int | None = option(
        "--accuracy-level",
        "arithmetic of ONNX Runtime's quantized GEMMs: int8 (4, faster) or float (0) (default: 4)",
        group=TARGET,
        type=int,
        choices=(0, 4),
    )
    kv_cache: str = option(
        "--kv-cache",
        "int8, for cpu and tensorrt: a quarter or half of the memory and of the reads in decode; cpu needs a recent "
        "ONNX Runtime (default: {default})",
        group=TARGET,
        default="float",
        type=_kv_cache,
        choices=("float", "int8"),
    )
    is_small: bool = False
    """Whether weights that are float16 for quality alone are as small as the target allows."""
    is_calibrated: bool = False
    """Whether samples are given. Quantized activations need them for their ranges."""
