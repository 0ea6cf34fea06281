"""``fusion-export``: a FUSION checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fusion_edge.export.bundle.writer import write_bundle
from fusion_edge.export.calibration.options import DEVICES, METHODS, CalibrationOptions
from fusion_edge.export.checkpoint.hub import resolve_checkpoint
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.dry_run import check_fit, dry_run
from fusion_edge.export.planning.memory import estimate
from fusion_edge.export.planning.plan import KV_CACHES, ExportOptions, ExportPlan, plan_export
from fusion_edge.export.planning.targets import ACTIVATIONS, PRESETS
from fusion_edge.quant.formats import group_sizes
from fusion_edge.quant.policy import VISION, Rule, read_rules
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.cli import common as cli
from fusion_edge.runtime.errors import FusionError, UsageError

CALIBRATION_OPTIONS = {
    "samples": "--samples",
    "held_out": "--held-out",
    "method": "--method",
    "device": "--device",
    "largest_drop": "--max-accuracy-drop",
    "budget": "--budget",
    "bits": "--bits",
    "sensitivity_samples": "--sensitivity-samples",
}
"""Option by the field of :class:`CalibrationOptions` that it sets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    arguments = parser().parse_args(argv)
    return cli.run(_export, arguments)


def parser() -> argparse.ArgumentParser:
    """Every option of ``fusion-export``."""
    parser = argparse.ArgumentParser(
        prog="fusion-export",
        description="Turn a FUSION checkpoint into a bundle: three quantized graphs that fusion-run answers with.",
    )
    add = parser.add_argument
    add("checkpoint", help="folder of a FUSION checkpoint, or a hub id such as org/name")
    add("-o", "--output", type=Path, metavar="BUNDLE", help="folder to write (required without --dry-run)")
    defaults = ExportOptions()
    precision = parser.add_mutually_exclusive_group()
    for name, text in (
        ("int4", "4-bit LLM and alignment, 8-bit vision, lm_head and embeddings (default)"),
        ("nf4", "as --int4, in bitsandbytes' NF4: closer, much slower on a CPU"),
        ("int8", "8-bit weights throughout"),
        ("fp16", "16-bit weights"),
        ("fp32", "32-bit weights: the reference"),
    ):
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, default=defaults.precision, help=text
        )
    add(
        "--group-size",
        type=_group_size,
        default=defaults.group_size,
        metavar="{" + ",".join(group_sizes()) + "}",
        help="input channels that share a scale; channel: all of a row (default: 128, in NF4 and FP4 64)",
    )
    add("--asym", action="store_true", help="4-bit weights with zero points: closer, and slower by a few percent")
    add(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="format of the weights that match, e.g. 'llm.layers.*.mlp.down=int8:64'; repeatable, the first match "
        "wins; what a checkpoint has quantized stays as it is unless a rule matches",
    )
    add("--rules", type=Path, metavar="FILE", help="TOML file of rules, considered after every --rule")
    add(
        "--query-len",
        type=cli.numbers,
        default=defaults.query_lengths,
        metavar="N[,N...]",
        help="query lengths to offer, the default first (default: all of the checkpoint's, 144 first)",
    )
    add(
        "--image-tokens",
        type=cli.positive,
        metavar="N",
        help="FUSION-L: resize the image's tokens to this square number, e.g. 256 (default: all)",
    )
    add(
        "--max-context",
        type=cli.positive,
        metavar="N",
        help="positions of the KV cache, prompt and answer (default: what the checkpoint was trained with)",
    )
    add(
        "--target",
        choices=[*ACTIVATIONS, *PRESETS],
        default=defaults.target,
        help="where it will run; a device's name stands for tensorrt and the options that suit it (default: "
        "%(default)s)",
    )
    add(
        "--accuracy-level",
        type=int,
        choices=(0, 4),
        default=defaults.accuracy_level,
        help="ONNX Runtime's quantized products in int8 arithmetic (4, faster) or in float (0) (default: 4)",
    )
    add(
        "--kv-cache",
        choices=KV_CACHES,
        default=defaults.kv_cache,
        help="int8: a quarter of the memory, read in every step; needs a recent ONNX Runtime (default: %(default)s)",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="DATA",
        help="fit the quantized weights to samples: a JSONL file of {image, question, answer}, or a folder of pictures",
    )
    add(
        "--vision",
        choices=VISION,
        help="the vision encoder in integers throughout (int8, needs --calibrate), with 8-bit weights alone, or in 16 "
        "bits (default: int8 with --calibrate for the cpu, else int8-weights)",
    )
    add("--samples", type=cli.positive, metavar="N", help="samples to calibrate with (default: 128)")
    add("--held-out", type=cli.positive, metavar="N", help="further samples, to compare with float (default: 16)")
    add("--method", choices=METHODS, help="how to fit: GPTQ, or round to nearest and only measure (default: gptq)")
    add("--device", choices=DEVICES, help="where to calibrate (default: cpu)")
    add(
        "--max-accuracy-drop",
        dest="largest_drop",
        type=_number,
        metavar="POINTS",
        help="fail (exit code 6) if more percentage points of the held-out samples' answers are lost",
    )
    mixed = parser.add_mutually_exclusive_group()
    mixed.add_argument(
        "--budget",
        type=cli.byte_count,
        metavar="SIZE",
        help="give 8 bits to the 4-bit weights that need them most, as many as a bundle of this size holds, e.g. 2.9GB",
    )
    mixed.add_argument(
        "--bits", type=_number, metavar="BITS", help="the same, up to this mean of bits a weight, scales included: 4.5"
    )
    add(
        "--sensitivity-samples",
        type=cli.positive,
        metavar="N",
        help="samples on which that need is measured (default: 4; time grows with them)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--force", action="store_true", help="replace an existing bundle, and the engines that were built of it")
    add("--dry-run", action="store_true", help="print sizes and memory, write nothing")
    add(
        "--fit",
        type=cli.byte_count,
        metavar="SIZE",
        help="refuse a bundle that does not run in this memory, e.g. 8GB (default: a device's own, if --target is one)",
    )
    add("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _group_size(text: str) -> int:
    if text not in group_sizes():
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(group_sizes())}")
    return group_sizes()[text]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 1.5")
    return number


def _export(arguments: argparse.Namespace) -> int:
    if arguments.output is None and not arguments.dry_run:
        raise UsageError("No output given; add -o BUNDLE, or --dry-run to see sizes only.")
    calibration = _calibration(arguments)
    options = _options(arguments, is_calibrated=calibration is not None)
    with Checkpoint(resolve_checkpoint(arguments.checkpoint, arguments.revision)) as checkpoint:
        plan = plan_export(checkpoint, options)
        fit = PRESETS[options.preset].memory if arguments.fit is None and options.preset else arguments.fit
        if arguments.dry_run:
            return dry_run(plan, calibration, fit, arguments.json)
        if fit is not None:
            check_fit(estimate(plan), fit)
        if calibration is None:
            manifest, report = write_bundle(plan, arguments.output, arguments.force)
        else:
            manifest, report = _export_calibrated(plan, calibration, arguments)
    written = manifest.size
    if arguments.json:
        result = {"bundle": str(arguments.output), "bytes": written, "precision": manifest.precision}
        sys.stdout.write(json.dumps(result | {"quantization": report.to_json(with_seconds=True)}) + "\n")
    else:
        sys.stdout.write(report.table() if report.linears else "")
        sizes = f"{cli.size(written)} from {cli.size(plan.source_bytes)}"
        sys.stdout.write(f"{arguments.output}: {sizes}, {manifest.precision}, {manifest.target}\n")
    return 0


def _export_calibrated(
    plan: ExportPlan, calibration: CalibrationOptions, arguments: argparse.Namespace
) -> tuple[Manifest, QuantizationReport]:
    from fusion_edge.export.calibration.driver import export_calibrated

    return export_calibrated(plan, calibration, arguments.output, arguments.force)


def _calibration(arguments: argparse.Namespace) -> CalibrationOptions | None:
    values = {name: getattr(arguments, name) for name in CALIBRATION_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    if arguments.calibrate is None:
        if given:
            option = CALIBRATION_OPTIONS[next(iter(given))]
            raise UsageError(f"{option} only works with --calibrate DATA; add it.")
        return None
    if find_spec("torch") is None:
        raise FusionError("--calibrate needs torch; install it with: pip install 'fusion-edge[calibrate]'.")
    return CalibrationOptions(arguments.calibrate, **given)


def _options(arguments: argparse.Namespace, is_calibrated: bool) -> ExportOptions:
    rules = [Rule.parse(text, arguments.group_size) for text in arguments.rule]
    if arguments.rules is not None:
        rules += read_rules(arguments.rules, arguments.group_size)
    return ExportOptions(
        precision=arguments.precision,
        group_size=arguments.group_size,
        rules=tuple(rules),
        query_lengths=arguments.query_len,
        image_tokens=arguments.image_tokens,
        max_context=arguments.max_context,
        target=PRESETS[arguments.target].target if arguments.target in PRESETS else arguments.target,
        preset=arguments.target if arguments.target in PRESETS else None,
        accuracy_level=arguments.accuracy_level,
        kv_cache=arguments.kv_cache,
        vision=arguments.vision,
        is_calibrated=is_calibrated,
        asymmetric=arguments.asym,
    )


if __name__ == "__main__":
    sys.exit(main())
