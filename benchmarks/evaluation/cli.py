"""Command line of ``fusion-eval``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fusion_edge.benchmarks.evaluation import summary
from fusion_edge.benchmarks.evaluation.asking import MAX_NEW_TOKENS, settings
from fusion_edge.benchmarks.evaluation.evaluate import Evaluation, OpenModel, evaluate
from fusion_edge.benchmarks.evaluation.models import open_model
from fusion_edge.benchmarks.evaluation.report.page import html_report
from fusion_edge.benchmarks.evaluation.report.rows import percent
from fusion_edge.benchmarks.evaluation.report.table import text
from fusion_edge.benchmarks.evaluation.result import CHOICE, CONTAINS, EXACT, SCHEMA, EvalResult
from fusion_edge.benchmarks.evaluation.samples import answered_samples
from fusion_edge.benchmarks.latency.machine.info import MachineInfo, machine_info
from fusion_edge.benchmarks.latency.machine.nvidia import find_gpu
from fusion_edge.benchmarks.latency.result_file import header
from fusion_edge.runtime.cli.bundle_argument import add_bundle, given_bundle
from fusion_edge.runtime.cli.choices import choice_list
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.model_options import add_deadline_option, add_device_options, load_options
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.errors import AccuracyError, UsageError
from fusion_edge.runtime.hub.bundle_source import BundleSource, find_bundle
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.resources import check_threads

Models = tuple[OpenModel, OpenModel | None]
"""Openers of the model and of the reference."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fusion-eval`` and return its exit code."""
    return run("fusion-eval", argv, _models)


def run(program: str, argv: Sequence[str] | None, models: Callable[[argparse.Namespace], Models]) -> int:
    """Run an evaluation with the options of ``fusion-eval`` and return its exit code.

    ``models`` returns what opens the models for the parsed options.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser(program).parse_args(given)
    arguments.command = f"{program} {shlex.join(given)}"
    return run_command(lambda options: _eval(options, models(options)), arguments)


def parser(program: str = "fusion-eval") -> argparse.ArgumentParser:
    """Return the parser of ``fusion-eval``, or of a program with its options."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Evaluate a bundle on samples with answers: accuracy, calibration error and latency, and agreement "
        "with a reference.",
    )
    add = parser.add_argument
    add_bundle(parser, "folder that fusion-export wrote, or a checkpoint folder")
    add("data", type=Path, help='JSONL file of {"image", "question", "answer"}, as for fusion-export --calibrate')
    add(
        "--reference",
        metavar="FOLDER",
        help="bundle or checkpoint of the same model, to compare answers and log-probabilities with",
    )
    add(
        "--match",
        choices=(EXACT, CONTAINS),
        help="what makes an answer right, for --min-accuracy and the calibration error (default: exact)",
    )
    add(
        "--choices",
        type=choice_list,
        default=(),
        metavar="TEXT,TEXT[,...]",
        help="score these answers instead of generating one; every sample's answer is one of them",
    )
    add(
        "--guide",
        metavar="TEXT",
        help="look at each image once under this text, and ask all its questions behind it; the text may be empty "
        "(default: each question is its own guide)",
    )
    add("--limit", type=positive_integer, metavar="N", help="use the first N samples (default: all)")
    add("--min-accuracy", type=percentage, metavar="PERCENT", help="exit with code 6 below this accuracy, e.g. 95%%")
    add(
        "--max-new-tokens",
        type=positive_integer,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="limit of generated tokens (default: %(default)s)",
    )
    add("--query-len", type=positive_integer, metavar="N", help="query length (default: the bundle's first)")
    add_deadline_option(parser)
    add_device_options(parser)
    add("--json", action="store_true", help="print the result as one JSON object")
    add(
        "--html",
        type=output_file,
        metavar="FILE",
        help="write an HTML report with the worst cases, one self-contained file",
    )
    return parser


def percentage(text: str) -> float:
    """Parse a percentage from 0 to 100, with or without its sign; return a share."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%?", text, re.ASCII)
    if match is None or float(match[1]) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage from 0 to 100, such as 95%")
    return float(match[1]) / 100


def _models(arguments: argparse.Namespace) -> Models:
    def opener(source: BundleSource) -> OpenModel:
        return partial(open_model, Path(source.folder), **load_options(arguments))

    reference = None if arguments.reference is None else opener(find_bundle(arguments.reference))
    return opener(given_bundle(arguments)), reference


def _eval(arguments: argparse.Namespace, models: Models) -> int:
    if arguments.threads is not None:
        check_threads(arguments.threads, "--threads")
    if arguments.choices and arguments.match is not None:
        raise UsageError("--match judges generated answers; leave it out, or drop --choices.")
    samples = answered_samples(arguments.data, arguments.limit)
    machine = machine_info(find_gpu())
    open_model, open_reference = models
    how = partial(
        settings,
        query_length=arguments.query_len,
        max_new_tokens=arguments.max_new_tokens,
        guide=arguments.guide,
        choices=arguments.choices,
        deadline=arguments.deadline,
        threads=arguments.threads,
    )
    evaluation = evaluate(open_model, samples, how, open_reference)
    result = _result(evaluation, arguments, machine)
    sys.stdout.write(result.to_json() if arguments.json else text(result))
    if arguments.html is not None:
        write_whole(arguments.html, html_report(result))
    _check_accuracy(result, arguments.min_accuracy)
    return 0


def _result(evaluation: Evaluation, arguments: argparse.Namespace, machine: MachineInfo) -> EvalResult:
    cases = evaluation.cases
    judged_by = CHOICE if arguments.choices else arguments.match or EXACT
    first, follow_up = (
        summary.latency([case for case in cases if case.is_follow_up is kind]) for kind in (False, True)
    )
    return EvalResult(
        **header(SCHEMA, machine),
        command=arguments.command,
        model=evaluation.model,
        data=arguments.data.name,
        settings=evaluation.settings,
        judged_by=judged_by,
        accuracy=summary.accuracy(cases),
        late=sum(case.finish_reason == "deadline" for case in cases),
        calibration=summary.calibration(cases, judged_by),
        first=first,
        follow_up=follow_up,
        comparison=summary.comparison(cases, evaluation.reference),
        cases=cases,
    )


def _check_accuracy(result: EvalResult, least: float | None) -> None:
    reached = result.accuracy[result.judged_by]
    if least is not None and reached.share < least:
        raise AccuracyError(
            f"{reached.count} of {reached.total} answers are right ({result.judged_by}, {percent(reached.share)}); "
            f"--min-accuracy expects {percent(least)}."
        )


if __name__ == "__main__":
    sys.exit(main())
