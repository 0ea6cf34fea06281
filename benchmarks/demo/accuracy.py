"""Accuracy of the demo model's bundles on held-out questions, by weight format, guide, detail and CPU tier.

    python -m fusion_edge.benchmarks.demo.accuracy --work FOLDER --json FILE

Formats and tiers are compared with the checkpoint. Guides and details are compared with the INT4 bundle at full detail,
whose questions are their own guides. Existing bundles and samples in ``--work`` are reused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.demo.samples import SAMPLES, write_samples
from fusion_edge.benchmarks.evaluation import summary
from fusion_edge.benchmarks.evaluation.asking import settings
from fusion_edge.benchmarks.evaluation.evaluate import ask
from fusion_edge.benchmarks.evaluation.reference import Reference
from fusion_edge.benchmarks.evaluation.report.rows import interval, percent
from fusion_edge.benchmarks.evaluation.result import EXACT
from fusion_edge.benchmarks.evaluation.samples import answered_samples
from fusion_edge.benchmarks.evaluation.scores import Share
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.export import cli
from fusion_edge.export.reference.eager_backend import open_checkpoint
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.samples import Sample
from fusion_edge.runtime.system.output_file import write_whole

CHECKPOINT = Path(__file__).parent / "checkpoint"
FEWEST_LATENTS, MOST_LATENTS = 4, 16
GENERIC_GUIDE = "What is in the picture?"
"""No question of the training, which is about colors, shapes, counts and places."""


@dataclass(frozen=True)
class Row:
    """A row of a table: a bundle, and how it is asked."""

    name: str
    export: tuple[str, ...] = ("--int4",)
    """Options of ``fusion-export``."""
    query_length: int = FEWEST_LATENTS
    guide: str | None = None
    tier: str | None = None
    """Of the CPU kernels; None: the fastest one."""


FORMATS = (
    Row("fp32", ("--fp32",)),
    Row("int8:128", ("--int8",)),
    Row("int4:128"),
    Row("int4:32", ("--int4", "--group-size", "32")),
    Row("nf4:64", ("--nf4",)),
    Row(
        "int4:128 for TensorRT, on ONNX Runtime",
        ("--int4", "--target=tensorrt", "--vision=int8-weights", "--rule=llm.lm_head=int8:channel"),
    ),
)
GUIDES = (
    Row("the question itself"),
    Row("generic", guide=GENERIC_GUIDE),
    Row("empty", guide=""),
)
DETAILS = tuple(
    Row(f"{tokens} image tokens, {latents} latents", ("--int4", "--image-tokens", str(tokens)), latents)
    for tokens in (64, 25, 16)
    for latents in (MOST_LATENTS, FEWEST_LATENTS)
)
TIERS = tuple(Row(tier, tier=tier) for tier in cpu_kernels.TIERS)
TABLES = {"formats": FORMATS, "guides": GUIDES, "details": DETAILS, "tiers": TIERS}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for samples and bundles; existing ones are reused")
    add("--table", choices=TABLES, action="append", help="what to measure, repeatable (default: all)")
    add("--questions", type=positive_integer, default=1000, help="number of questions (default: %(default)s)")
    add(
        "--compared",
        type=positive_integer,
        default=200,
        help="number of questions to compare with the reference (default: %(default)s)",
    )
    add("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    folder: Path = options.work / f"questions-{options.questions}"
    if not (folder / SAMPLES).exists():  # written last
        write_samples(folder, options.questions, held_out=True)
    samples = answered_samples(folder)
    machine = asdict(machine_info(None))
    tables = {name: list(_measure(name, samples, options)) for name in options.table or TABLES}
    result = {"questions": options.questions, "compared": options.compared, "machine": machine, "tables": tables}
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n".join(table(name, rows) for name, rows in tables.items()))
    return 0


def _measure(name: str, samples: Sequence[Sample], options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Yield the figures of each row of a table."""
    rows, work = TABLES[name], options.work
    compared, others = samples[: options.compared], samples[options.compared :]
    with open_checkpoint(CHECKPOINT) if name in ("formats", "tiers") else _open(rows[0], work) as fusion:
        reference = Reference(fusion, compared, settings(fusion, rows[0].query_length))
    with reference:
        for row in rows:
            if row.tier is not None and not (cpu_kernels.library() and cpu_kernels.use_tier(row.tier)):
                sys.stderr.write(f"{row.name}: not on this machine\n")
                continue
            with _open(row, work) as fusion:
                asked = settings(fusion, row.query_length, guide=row.guide)
                cases = [*ask(fusion, compared, asked, reference).cases, *ask(fusion, others, asked).cases]
            comparison = summary.comparison(cases, reference.model)
            assert comparison is not None
            sys.stderr.write(f"{row.name}\n")
            yield {
                "name": row.name,
                "export": row.export,
                "query_length": row.query_length,
                "image_tokens": asked.image_tokens,
                "guide": row.guide,
                "accuracy": asdict(summary.accuracy(cases)[EXACT]),
                "calibration_error": summary.calibration(cases, EXACT).error,
                "same_answer": asdict(comparison.same_answer),
                "kl_first_token": comparison.kl_first_token,
                "kl_per_position": comparison.kl_per_position,
            }


def _open(row: Row, work: Path) -> Fusion:
    bundle = work / "-".join(option.removeprefix("--") for option in row.export)
    if not bundle.exists() and cli.main([str(CHECKPOINT), "-o", str(bundle), *row.export]) != 0:
        raise FusionError(f"Export of {bundle} failed; see its error above.")
    return load(bundle, threads=1)  # threads of so small a model only wait for each other


def table(name: str, rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = [f"| {name} | accuracy | 95% interval | same answer | KL, first token | calibration error |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        exact, same = (Share(**row[key]) for key in ("accuracy", "same_answer"))
        cells = [row["name"], percent(exact.share), interval(exact), percent(same.share)]
        cells += [f"{row['kl_first_token']:.2g} nats", percent(row["calibration_error"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
