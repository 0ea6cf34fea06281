"""``fusion-info``: print the facts of a bundle and verify its files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.bundle.engine_manifest import EngineCheck
from fusion_edge.runtime.bundle.engines import all_engines
from fusion_edge.runtime.bundle.image_memory import image_memory
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.quantization_report import read_report
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle, verify
from fusion_edge.runtime.cli.bundle_argument import add_bundle, given_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import printable
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.hub.bundle_source import BundleSource
from fusion_edge.runtime.system.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fusion-info`` and return the exit code."""
    return run_command(_info, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Return the command line parser of ``fusion-info``."""
    parser = argparse.ArgumentParser(
        prog="fusion-info", description="Print a summary of a bundle and verify the checksum of every file."
    )
    add_bundle(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the manifest and the memory of an image as one JSON object"
    )
    return parser


def _info(arguments: argparse.Namespace) -> int:
    source = given_bundle(arguments)
    bundle = open_bundle(source.folder)
    with Progress("Verifying", bundle.manifest.size) as progress:
        verify(bundle, progress.advance)
    if arguments.json:
        report = dataclasses.asdict(bundle.manifest) | {"memory": dataclasses.asdict(image_memory(bundle.manifest))}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(_text(bundle, source))
    return 0


def _text(bundle: Bundle, source: BundleSource) -> str:
    manifest = bundle.manifest
    model, language, vision = manifest.model, manifest.model.language, manifest.model.vision
    memory = image_memory(manifest)
    rows = [
        ("Bundle", str(bundle.folder)),
        *([("Hub", f"{source.hub_id} at commit {source.commit}")] if source.hub_id else []),
        ("Made by", manifest.producer),
        ("From", manifest.source),
        ("Target", manifest.target),
        ("Precision", manifest.precision),
        ("LLM", f"{language.layers} layers, width {language.hidden_size}, vocabulary {language.vocab_size}"),
        ("Vision", f"{vision.layers} layers, width {vision.width}, {vision.patches} patches per crop"),
        ("Alignment", f"{model.alignment.layers} interaction layers"),
        ("Image tokens", str(manifest.image_side**2)),
        ("Query lengths", ", ".join(map(str, manifest.query_lengths))),
        ("Context", f"{manifest.max_context} tokens, {manifest.cache} KV cache"),
        ("Cached image", f"{format_bytes(memory.cached_image)} with {manifest.query_lengths[0]} latents"),
        ("Scene", f"{format_bytes(memory.scene_prefix)} of KV cache in addition"),
        *_weight_rows(manifest),
        *_quantization_rows(bundle),
        *((entry.path, format_bytes(entry.size)) for entry in manifest.files),
        ("All checksums", "correct"),
        ("CPU kernels", _cpu_kernels(manifest)),
        *_engine_rows(bundle),
    ]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{printable(name.ljust(width))}  {printable(value)}\n" for name, value in rows)


def _cpu_kernels(manifest: Manifest) -> str:
    """Name the tier of this machine's processor, or the reason why the bundle runs without our kernels here."""
    reason = cpu_kernels.unsupported_reason(manifest)
    return f"not used. {reason}" if reason else f"{cpu_kernels.tier()}, on this machine"


def _weight_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Count the weights by graph and format."""
    counts = Counter((name.split(".")[0], weight_format) for name, weight_format in manifest.weights.items())
    return [
        (f"{part} weights", f"{count} in {weight_format}") for (part, weight_format), count in sorted(counts.items())
    ]


def _engine_rows(bundle: Bundle) -> list[tuple[str, str]]:
    """List the engines of the bundle, each with its comparison with the CPU."""
    rows = []
    for engines, is_current in all_engines(bundle):
        stale = "" if is_current else "; stale, from an earlier bundle: build them again"
        size = f"{engines.max_context} tokens, {format_bytes(engines.size)}"
        rows.append(("Engines", f"{engines.machine}, {size}{stale}"))
        reasons = engines.float16_parts.items()
        rows += [("In float16", f"{file}, because INT8 failed: {reason}") for file, reason in reasons]
        rows.append(("Compared", _compared(engines.check)))
    return rows


def _compared(check: EngineCheck) -> str:
    """List the relative errors of the stages, and the KL divergences of those with logits, or say why there is none."""
    if check.skipped is not None:
        return f"no: {check.skipped}"
    beside = "" if check.reference is None else f"with {check.reference}: "
    return beside + ", ".join(
        f"{one.stage} {one.relative_error:.1e}" + (f" (KL {one.logits.kl_divergence:.1e})" if one.logits else "")
        for one in check.stages
    )


def _quantization_rows(bundle: Bundle) -> list[tuple[str, str]]:
    """Summarize the quantization report, if the bundle has one. Raise :class:`FusionError` if it is invalid."""
    report = read_report(bundle)
    if report is None:
        return []
    methods = Counter(linear.method for linear in report.linears)
    summary = ", ".join(f"{count} by {method}" for method, count in methods.items())
    rows = [("Quantized", f"{summary}; {report.calibration_samples} calibration samples")]
    return rows + report.rows()


if __name__ == "__main__":
    sys.exit(main())
