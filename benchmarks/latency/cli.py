"""Command line of ``fusion-bench``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from fusion_edge.benchmarks.latency import compare
from fusion_edge.benchmarks.latency.bench import BenchConfig, CaseRun, bench, case_result, device_peaks
from fusion_edge.benchmarks.latency.machine.info import ClockWatch, machine_info
from fusion_edge.benchmarks.latency.machine.nvidia import find_gpu
from fusion_edge.benchmarks.latency.report import table
from fusion_edge.benchmarks.latency.report.page import html_report
from fusion_edge.benchmarks.latency.result import SCHEMA, BenchResult, BundleInfo, read_result
from fusion_edge.benchmarks.latency.result_file import header
from fusion_edge.benchmarks.latency.stages import make_up_picture
from fusion_edge.runtime.backends.devices import AUTO, NAMES
from fusion_edge.runtime.bundle.engines import bundle_digest
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.cli.bundle_argument import add_bundle, given_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import integer_list, positive_integer
from fusion_edge.runtime.images.preprocessing import load_image
from fusion_edge.runtime.system.output_file import check_output_file, write_whole
from fusion_edge.runtime.system.resources import check_threads, usable_processors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["compare"]:
        return run_command(_compare, compare_parser().parse_args(given[1:]))
    arguments = parser().parse_args(given)
    arguments.command = shlex.join(["fusion-bench", *given])
    return run_command(_bench, arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``fusion-bench``."""
    defaults, cores = BenchConfig(Path()), usable_processors()
    parser = argparse.ArgumentParser(
        prog="fusion-bench",
        description="Measure a bundle: time to first token, decode tokens/s, every stage, memory and energy, against "
        "the device's rooflines. Lists of values make a matrix of cases.",
        epilog="fusion-bench compare A.json B.json compares two results.",
    )
    add = parser.add_argument
    add_bundle(parser)
    for option, default, text in (
        ("--prompt-tokens", defaults.prompt_tokens, "tokens of the prompt, image included (default: a short question)"),
        ("--new-tokens", defaults.new_tokens, "decode steps per round (default: 32)"),
        ("--context", defaults.context, "tokens in the KV cache at the first decode step (default: the prompt's)"),
        ("--query-len", defaults.query_lengths, "latents per question (default: the bundle's first)"),
        ("--image-tokens", defaults.image_tokens, "image tokens, a square number (default: the bundle's)"),
        ("--threads", (cores,), f"CPU threads (default: {cores}, all processors available to this process)"),
    ):
        add(option, type=integer_list, default=default, metavar="N[,N...]", help=text)
    names = ", ".join(NAMES)
    add("--backend", type=_devices, default=(AUTO,), metavar="NAME[,NAME...]", help=f"{names} (default: the best)")
    add("--image", metavar="FILE", help="image to ask about (default: noise, 1280 x 720)")
    add("--ask", metavar="TEXT", help="question to ask (default: a short one)")
    until = parser.add_mutually_exclusive_group()
    until.add_argument(
        "--seconds",
        type=positive_integer,
        default=round(defaults.seconds),
        metavar="N",
        help="time limit per case; a case ends earlier when its medians are precise to 3%% (default: %(default)s)",
    )
    until.add_argument("--duration", type=positive_integer, metavar="N", help="soak test: fixed seconds per case")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the result as one JSON object")
    output.add_argument("--csv", action="store_true", help="print one CSV row per case and stage")
    add("--html", type=Path, metavar="FILE", help="write an HTML report, one self-contained file")
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """Return the parser of ``fusion-bench compare``."""
    parser = argparse.ArgumentParser(prog="fusion-bench compare", description="Compare two results of fusion-bench.")
    add = parser.add_argument
    add("before", type=Path, help="file written by fusion-bench --json")
    add("after", type=Path, help="later file")
    text = "exit with code 1 if a measure is slower by more than this, e.g. 5%%"
    add("--fail-above", type=_share, metavar="PERCENT", help=text)
    add("--json", action="store_true", help="print the comparison as one JSON object")
    return parser


def _devices(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if wrong := [name for name in names if name not in (AUTO, *NAMES)]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is unknown; choose from {', '.join((AUTO, *NAMES))}")
    if AUTO in names and len(names) > 1:
        raise argparse.ArgumentTypeError(f"{AUTO} chooses one of the others; pass it alone, or list the others")
    return names


def _share(text: str) -> float:
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*%?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage such as 5%")
    return float(match[1]) / 100


def _bench(arguments: argparse.Namespace) -> int:
    bundle = open_bundle(given_bundle(arguments).folder)
    if arguments.html is not None:
        check_output_file(arguments.html)
    threads = max(arguments.threads)
    check_threads(threads, "--threads")
    if arguments.image is not None:
        load_image(arguments.image)  # raises for a file that is no image
    gpu = None if arguments.backend == ("cpu",) or bundle.manifest.target == "cpu" else find_gpu()
    machine = machine_info(gpu)
    runs: list[CaseRun] = []
    with TemporaryDirectory() as folder, ClockWatch(gpu) as watch:
        picture = Path(folder) / "picture.jpg" if arguments.image is None else Path(arguments.image)
        if arguments.image is None:
            make_up_picture(picture)
        config = _config(arguments, picture)
        for device, count in dict.fromkeys(product(arguments.backend, arguments.threads)):
            runs += bench(bundle, device, count, config, gpu)
    peaks = {device: device_peaks(device, threads, runs) for device in dict.fromkeys(run.case.device for run in runs)}
    result = BenchResult(
        **header(SCHEMA, replace(machine, throttled=watch.throttled, clocks=watch.clocks)),
        command=arguments.command,
        bundle=_bundle_info(bundle),
        peaks=peaks,
        cases=tuple(case_result(bundle.manifest, run, peaks[run.case.device]) for run in runs),
    )
    sys.stdout.write(result.to_json() if arguments.json else table.csv(result) if arguments.csv else table.text(result))
    if arguments.html is not None:
        write_whole(arguments.html, html_report(result))
    return 0


def _bundle_info(bundle: Bundle) -> BundleInfo:
    manifest = bundle.manifest
    return BundleInfo(
        source=manifest.source,
        target=manifest.target,
        precision=manifest.precision,
        size=manifest.size,
        digest=bundle_digest(bundle),
        max_context=manifest.max_context,
    )


def _config(arguments: argparse.Namespace, picture: Path) -> BenchConfig:
    return BenchConfig(
        picture=picture,
        ask=arguments.ask,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        context=arguments.context,
        query_lengths=arguments.query_len,
        image_tokens=arguments.image_tokens,
        seconds=arguments.seconds,
        duration=arguments.duration,
    )


def _compare(arguments: argparse.Namespace) -> int:
    before, after = read_result(arguments.before), read_result(arguments.after)
    comparisons = compare.compare(before, after)
    warnings = compare.differences(before, after)
    if arguments.json:
        sys.stdout.write(compare.to_json(comparisons, warnings))
    else:
        sys.stderr.writelines(f"warning: {warning}\n" for warning in warnings)
        sys.stdout.write(compare.text(comparisons))
    if arguments.fail_above is None:
        return 0
    slower = compare.fail_above(comparisons, arguments.fail_above)
    sys.stderr.writelines(f"slower by more than {arguments.fail_above:.1%}: {one.name}\n" for one in slower)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
