"""``fusion-export``: a FUSION checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion_edge.export.bundle_writer import write_bundle
from fusion_edge.export.memory import Estimate, estimate
from fusion_edge.export.plan import ACTIVATIONS, KV_CACHES, ExportOptions, ExportPlan, plan_export
from fusion_edge.export.safetensors_file import Checkpoint
from fusion_edge.export.source import resolve_checkpoint
from fusion_edge.quant.formats import GROUP_SIZES
from fusion_edge.quant.policy import Rule, read_rules
from fusion_edge.runtime import cli
from fusion_edge.runtime.errors import FusionError, UsageError

UNITS = {"": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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
        ("int8", "8-bit weights throughout"),
        ("fp16", "16-bit weights"),
        ("fp32", "32-bit weights: the reference"),
    ):
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, default=defaults.precision, help=text
        )
    add(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=defaults.group_size,
        help="input channels that share a scale (default: %(default)s)",
    )
    add(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="format of the weights that match, e.g. 'llm.layers.*.mlp.down=int8:64'; repeatable, the first match wins",
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
    add("--target", choices=list(ACTIVATIONS), default=defaults.target, help="where it will run (default: %(default)s)")
    add(
        "--accuracy-level",
        type=int,
        choices=(0, 4),
        default=defaults.accuracy_level,
        help="quantized products in int8 arithmetic (4, faster) or in float (0) (default: %(default)s)",
    )
    add(
        "--kv-cache",
        choices=KV_CACHES,
        default=defaults.kv_cache,
        help="int8: a quarter of the memory, read in every step; needs a recent ONNX Runtime (default: %(default)s)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--force", action="store_true", help="replace an existing bundle")
    add("--dry-run", action="store_true", help="print sizes and memory, write nothing")
    add("--fit", type=_bytes, metavar="SIZE", help="with --dry-run: say whether it runs in this memory, e.g. 8GB")
    add("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 7.4GiB")
    return int(float(match[1]) * units[match[2].lower()])


def _export(arguments: argparse.Namespace) -> int:
    if arguments.output is None and not arguments.dry_run:
        raise UsageError("No output given; add -o BUNDLE, or --dry-run to see sizes only.")
    if arguments.fit is not None and not arguments.dry_run:
        raise UsageError("--fit only works with --dry-run; add it.")
    options = _options(arguments)
    with Checkpoint(resolve_checkpoint(arguments.checkpoint, arguments.revision)) as checkpoint:
        plan = plan_export(checkpoint, options)
        if arguments.dry_run:
            return _report(plan, arguments.fit, arguments.json)
        manifest = write_bundle(plan, arguments.output, arguments.force)
    if arguments.json:
        result = {"bundle": str(arguments.output), "bytes": plan.bundle_bytes, "precision": manifest.precision}
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        read, written = cli.size(plan.source_bytes), cli.size(plan.bundle_bytes)
        sys.stdout.write(f"{arguments.output}: {written} from {read}, {manifest.precision}, {manifest.target}\n")
    return 0


def _options(arguments: argparse.Namespace) -> ExportOptions:
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
        target=arguments.target,
        accuracy_level=arguments.accuracy_level,
        kv_cache=arguments.kv_cache,
    )


def _report(plan: ExportPlan, fit: int | None, as_json: bool) -> int:
    """Print a dry run. Raises :class:`FusionError` if the bundle does not fit."""
    sizes = estimate(plan)
    fits = None if fit is None else sizes.peak <= fit
    if as_json:
        report = dataclasses.asdict(sizes) | {"peak": sizes.peak, "fits": fits}
        report["formats"] = {name: str(form) for name, form in plan.formats.items()}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(_report_text(plan, sizes))
    if fit is not None and not fits:
        raise FusionError(
            f"It does not fit: the peak is {cli.size(sizes.peak)}, {cli.size(sizes.peak - fit)} more than "
            f"{cli.size(fit)}; try a smaller --max-context, a smaller --query-len or --int4."
        )
    if fit is not None and not as_json:
        sys.stdout.write(f"It fits in {cli.size(fit)}, with {cli.size(fit - sizes.peak)} to spare.\n")
    return 0


def _report_text(plan: ExportPlan, sizes: Estimate) -> str:
    rows = [("On disk", ""), *((f"  {name}", cli.size(count)) for name, count in sizes.graphs.items())]
    rows += [
        ("  bundle", cli.size(sizes.bundle)),
        ("In memory", ""),
        ("  weights", cli.size(sizes.weights)),
        (f"  KV cache, {plan.settings.max_context} positions", cli.size(sizes.key_value_cache)),
        (f"  alignment of one image, {plan.options.query_lengths[0]} latents", cli.size(sizes.alignment_cache)),
        ("  activations", cli.size(sizes.activations)),
        ("  peak", cli.size(sizes.peak)),
    ]
    return cli.table(rows)


if __name__ == "__main__":
    sys.exit(main())
