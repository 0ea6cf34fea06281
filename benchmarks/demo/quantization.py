"""Compare GPTQ with rounding to nearest on the demo model, by weight format.

    python -m fusion_edge.benchmarks.demo.quantization --work FOLDER --json FILE

Every row is a bundle exported with ``--calibrate``, compared with the float model on held-out samples and evaluated on
held-out questions. A bundle in ``--work`` with as many held-out samples is reused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.demo.samples import SAMPLES, write_samples
from fusion_edge.benchmarks.evaluation.asking import settings
from fusion_edge.benchmarks.evaluation.evaluate import evaluate
from fusion_edge.benchmarks.evaluation.result import EXACT
from fusion_edge.benchmarks.evaluation.samples import answered_samples
from fusion_edge.benchmarks.evaluation.summary import accuracy
from fusion_edge.export import cli
from fusion_edge.runtime import load
from fusion_edge.runtime.bundle.manifest import QUANTIZATION
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.output_file import write_whole

CHECKPOINT = Path(__file__).parent / "checkpoint"
CALIBRATING = 128
QUERY_LENGTH = 4


@dataclass(frozen=True)
class Variant:
    """Row of the table: options of ``fusion-export``."""

    format: str
    method: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.format}-{self.method}".replace(":", "-").replace(" ", "-")


FORMATS = {
    "int4:128": ("--int4",),
    "int4:32": ("--int4", "--group-size", "32"),
    "int4:channel": ("--int4", "--group-size", "channel"),
    "int4:128 asymmetric": ("--int4", "--asym"),
    "int8:128": ("--int8",),
}
VARIANTS = [Variant(name, method, options) for name, options in FORMATS.items() for method in ("rtn", "gptq")]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for samples and bundles; existing ones are reused")
    add("--format", choices=FORMATS, action="append", help="weight format, repeatable (default: all)")
    add(
        "--held-out",
        type=positive_integer,
        default=500,
        help="held-out samples (default: %(default)s)",
    )
    add("--questions", type=positive_integer, default=1000, help="number of questions (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    samples: Path = options.work / f"samples-{options.held_out}"
    questions: Path = options.work / f"questions-{options.questions}"
    if not (samples / SAMPLES).exists():  # written last
        write_samples(samples, CALIBRATING + options.held_out)
    if not (questions / SAMPLES).exists():
        write_samples(questions, options.questions, held_out=True)
    rows: list[dict[str, Any]] = []
    reports: dict[tuple[str, str], QuantizationReport] = {}
    formats = options.format or list(FORMATS)
    for variant in VARIANTS:
        if variant.format not in formats:
            continue
        bundle = options.work / f"{variant.name}-{options.held_out}"
        _export(bundle, variant, samples, options.held_out)
        report = reports[variant.format, variant.method] = QuantizationReport.read(bundle / QUANTIZATION)
        evaluation = evaluate(
            partial(load, bundle), answered_samples(questions), partial(settings, query_length=QUERY_LENGTH)
        )
        rows.append(_row(variant, report, accuracy(evaluation.cases)[EXACT].share))
    result = {
        "calibrating": CALIBRATING,
        "held_out": options.held_out,
        "questions": options.questions,
        "rows": rows,
        "gptq_over_rtn": [_compared(name, reports[name, "rtn"], reports[name, "gptq"]) for name in formats],
    }
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(result))
    return 0


def _export(bundle: Path, variant: Variant, samples: Path, held_out_samples: int) -> None:
    common = ["-o", str(bundle), "--query-len", "4,16", "--calibrate", str(samples), "--method", variant.method]
    common += ["--held-out", str(held_out_samples)]
    if not bundle.exists() and cli.main([str(CHECKPOINT), *common, *variant.options]) != 0:
        raise FusionError(f"Export of {bundle} failed; see its error above.")


def _row(variant: Variant, report: QuantizationReport, exact: float) -> dict[str, Any]:
    end_to_end = report.end_to_end
    assert end_to_end is not None
    return {
        "format": variant.format,
        "method": variant.method,
        "cosine": dict(end_to_end.cosine),
        "kl_divergence": end_to_end.kl_divergence,
        "top1_agreement": end_to_end.top1_agreement,
        "accuracy": exact,
    }


def _compared(name: str, rtn: QuantizationReport, gptq: QuantizationReport) -> dict[str, Any]:
    """Compare GPTQ with rounding in one format: ratio of KL divergences, and linears with closer outputs."""
    assert rtn.end_to_end is not None
    assert gptq.end_to_end is not None
    rounded = {linear.name: linear.output_sqnr for linear in rtn.linears}
    pairs = [
        (linear.output_sqnr, other)
        for linear in gptq.linears
        if linear.output_sqnr is not None and (other := rounded[linear.name]) is not None
    ]
    return {
        "format": name,
        "kl_divergence": gptq.end_to_end.kl_divergence / rtn.end_to_end.kl_divergence,
        "linears": len(pairs),
        "linears_closer": sum(ours > other for ours, other in pairs),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = ["| format | method | vision | alignment | logits | KL divergence | accuracy |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        cosines = [f"{1 - value:.2g}" for value in row["cosine"].values()]
        cells = [row["format"], row["method"], *cosines, f"{row['kl_divergence']:.2g} nats", f"{row['accuracy']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    for compared in result["gptq_over_rtn"]:
        ratio, closer, linears = (compared[key] for key in ("kl_divergence", "linears_closer", "linears"))
        lines.append("")
        lines.append(f"{compared['format']}: KL divergence {ratio:.2f} x, {closer} of {linears} outputs closer")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
