"""``fusion-export``: export a FUSION checkpoint as a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusion_edge.export.bundle.writer import check_output, resolve_output, write_bundle
from fusion_edge.export.calibration.options import CALIBRATION, CalibrationOptions
from fusion_edge.export.checkpoint.hub import resolve_checkpoint
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.dry_run import check_fit, dry_run
from fusion_edge.export.planning.arguments import add_options, flag_of, given
from fusion_edge.export.planning.memory import estimate, plan_for_memory
from fusion_edge.export.planning.options import PRECISION, SHAPES, TARGET, ExportOptions
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.export.planning.rules import Rule, read_rules
from fusion_edge.export.publishing.options import HUB, add_hub_options, existing_bundle, given_destination
from fusion_edge.export.publishing.push import Destination, prepare_destination, push_bundle
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.bundle.reader import open_bundle, verify
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import byte_count
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.system.interruptible import leave_abandoned
from fusion_edge.runtime.system.progress import Progress

OUTPUT = "output"
"""Group of options in ``--help``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code; does not return after an interrupt inside a long upload."""
    arguments = parser().parse_args(argv)
    return leave_abandoned(run_command(_export, arguments))


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``fusion-export``."""
    parser = argparse.ArgumentParser(
        prog="fusion-export",
        description="Export a FUSION checkpoint as a bundle: three quantized graphs that fusion-run answers with.",
    )
    parser.add_argument("checkpoint", help="folder of a FUSION checkpoint, or a hub id such as org/name")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    groups = {name: parser.add_argument_group(name) for name in (OUTPUT, HUB, PRECISION, SHAPES, TARGET, CALIBRATION)}
    _add_output(groups[OUTPUT])
    add_hub_options(groups[HUB])
    groups[CALIBRATION].add_argument(
        "--calibrate",
        type=Path,
        metavar="DATA",
        help="quantize with samples: a JSONL file of {image, question, answer}, or a folder of images",
    )
    add_options(groups, ExportOptions)
    add_options(groups, CalibrationOptions)
    _add_rules(groups[PRECISION])
    groups[TARGET].add_argument(
        "--fit",
        type=byte_count,
        metavar="SIZE",
        help="refuse a bundle that does not run in this memory, e.g. 8GB; tensorrt: where a 16-bit lm_head does not "
        "fit, it has 4 bits (default: the memory of --target's device)",
    )
    return parser


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-o", "--output", type=Path, metavar="BUNDLE", help="folder to write (required without --dry-run)")
    add("--force", action="store_true", help="replace an existing bundle and the engines built from it")
    add("--dry-run", action="store_true", help="print sizes and memory, write nothing")
    add("--json", action="store_true", help="print the result as one JSON object")


def _add_rules(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="format of the weights that match, e.g. 'llm.layers.*.mlp.down=int8:64'; repeatable, the first match "
        "wins; prequantized weights keep their format unless a rule matches",
    )
    group.add_argument("--rules", type=Path, metavar="FILE", help="TOML file of rules, applied after every --rule")


def _export(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    destination = given_destination(arguments)
    if destination is not None and (existing := existing_bundle(arguments)) is not None:
        return _publish(arguments, existing, destination)
    if arguments.output is None and not arguments.dry_run:
        raise UsageError("No output given; add -o BUNDLE, or --dry-run to see sizes only.")
    calibration = _calibration(arguments)
    options = _options(arguments, is_calibrated=calibration is not None)
    with Checkpoint(resolve_checkpoint(arguments.checkpoint, arguments.revision)) as checkpoint:
        plan = plan_for_memory(checkpoint, options, arguments.fit)
        fit = plan.options.memory if arguments.fit is None else arguments.fit
        if arguments.dry_run:
            return dry_run(plan, calibration, fit, arguments.json)
        if fit is not None:
            check_fit(estimate(plan), fit)
        if destination is not None:
            check_output(resolve_output(output), arguments.force)
            prepare_destination(destination)  # before the work of hours
        if calibration is None:
            manifest, report = write_bundle(plan, output, arguments.force)
        else:
            manifest, report = _export_calibrated(plan, calibration, arguments)
        result: dict[str, Any] = {"bundle": str(output), "bytes": manifest.size, "precision": manifest.precision}
        if not arguments.json:
            sys.stdout.write(_text(arguments, plan, manifest, report))
            sys.stdout.flush()
        if destination is not None:
            result |= _push(arguments, output, destination, checkpoint.folder)
    if arguments.json:
        sys.stdout.write(json.dumps(result | {"quantization": report.to_json(with_seconds=True)}) + "\n")
    return 0


def _publish(arguments: argparse.Namespace, folder: Path, destination: Destination) -> int:
    """Publish a bundle that exists already."""
    bundle = open_bundle(folder)
    with Progress("Verifying", bundle.manifest.size) as progress:
        verify(bundle, progress.advance)
    prepare_destination(destination)
    result: dict[str, Any] = {"bundle": str(folder)} | _push(arguments, folder, destination, None)
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _push(
    arguments: argparse.Namespace, bundle: Path, destination: Destination, checkpoint: Path | None
) -> dict[str, Any]:
    """Publish a bundle, and return its part of the result."""
    published = push_bundle(bundle, destination, checkpoint)
    if not arguments.json:
        sys.stdout.write(f"{bundle}: published as {published.url} at commit {published.commit}\n")
    return {"hub": dataclasses.asdict(published)}


def _export_calibrated(
    plan: ExportPlan, calibration: CalibrationOptions, arguments: argparse.Namespace
) -> tuple[Manifest, QuantizationReport]:
    from fusion_edge.export.calibration.driver import export_calibrated  # needs torch

    return export_calibrated(plan, calibration, arguments.output, arguments.force)


def _text(arguments: argparse.Namespace, plan: ExportPlan, manifest: Manifest, report: QuantizationReport) -> str:
    table = report.table() if report.linears else ""
    sizes = f"{format_bytes(manifest.size)} from {format_bytes(plan.source_bytes)}"
    return f"{table}{arguments.output}: {sizes}, {manifest.precision}, {manifest.target}\n"


def _calibration(arguments: argparse.Namespace) -> CalibrationOptions | None:
    values = given(arguments, CalibrationOptions)
    if arguments.calibrate is None:
        if values:
            flag = flag_of(CalibrationOptions, next(iter(values)))
            raise UsageError(f"{flag} only works with --calibrate DATA; add it.")
        return None
    if find_spec("torch") is None:
        raise FusionError("--calibrate needs torch; run pip install '.[calibrate]' in a clone of fusion-edge.")
    return CalibrationOptions(arguments.calibrate, **values)


def _options(arguments: argparse.Namespace, is_calibrated: bool) -> ExportOptions:
    values = given(arguments, ExportOptions)
    group_size = values.get("group_size")
    rules = [Rule.parse(text, group_size) for text in arguments.rule]
    if arguments.rules is not None:
        rules += read_rules(arguments.rules, group_size)
    return ExportOptions(**values, rules=tuple(rules), is_calibrated=is_calibrated)


if __name__ == "__main__":
    sys.exit(main())
