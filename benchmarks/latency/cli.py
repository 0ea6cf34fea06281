"""``fusion-bench``: how long a robot waits, and how much of the machine's limits that is."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from fusion_edge.benchmarks.latency import compare
from fusion_edge.benchmarks.latency.bench import Run, Wanted, bench, device_rates, measured
from fusion_edge.benchmarks.latency.machine.info import ClockWatch, machine_facts
from fusion_edge.benchmarks.latency.machine.nvidia import find_gpu
from fusion_edge.benchmarks.latency.report import table
from fusion_edge.benchmarks.latency.report.page import html_report
from fusion_edge.benchmarks.latency.result import SCHEMA_VERSION, BundleFacts, Result, read_result
from fusion_edge.benchmarks.latency.stages import make_up_picture
from fusion_edge.runtime.backends.devices import AUTO, NAMES
from fusion_edge.runtime.bundle.engines import bundle_digest
from fusion_edge.runtime.bundle.manifest import producer
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import integer_list, positive_integer
from fusion_edge.runtime.images.preprocessing import load_image
from fusion_edge.runtime.system.output_file import check_output_file, write_whole
from fusion_edge.runtime.system.resources import check_threads, usable_processors


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["compare"]:
        return run_command(_compare, compare_parser().parse_args(given[1:]))
    arguments = parser().parse_args(given)
    arguments.command = shlex.join(["fusion-bench", *given])
    return run_command(_bench, arguments)


def parser() -> argparse.ArgumentParser:
    """Every option of ``fusion-bench``."""
    defaults, cores = Wanted(Path()), usable_processors()
    parser = argparse.ArgumentParser(
        prog="fusion-bench",
        description="Measure a bundle: every stage of a question, first token, tokens/s, memory, energy, beside what "
        "the machine allows. Options that take lists make a matrix.",
        epilog="fusion-bench compare A.json B.json tells what changed between two results.",
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder that fusion-export wrote")
    for option, default, text in (
        ("--prompt-tokens", defaults.prompt_tokens, "rows of the prompt, image included (default: a short question's)"),
        ("--new-tokens", defaults.new_tokens, "steps that are timed in every round (default: 32)"),
        ("--context", defaults.context, "positions in the cache when steps are timed (default: the prompt's)"),
        ("--query-len", defaults.query_lengths, "latents of a question (default: the bundle's first)"),
        ("--image-tokens", defaults.image_tokens, "square numbers (default: the bundle's)"),
        ("--threads", (cores,), f"of the CPU (default: {cores}, every processor that this process may use)"),
    ):
        add(option, type=integer_list, default=default, metavar="N[,N...]", help=text)
    names = ", ".join(NAMES)
    add("--backend", type=_devices, default=(AUTO,), metavar="NAME[,NAME...]", help=f"of {names} (default: the best)")
    add("--image", metavar="FILE", help="a picture of yours (default: noise of 1280 x 720)")
    add("--ask", metavar="TEXT", help="a question of yours (default: a short one)")
    until = parser.add_mutually_exclusive_group()
    until.add_argument(
        "--seconds",
        type=positive_integer,
        default=round(defaults.seconds),
        metavar="N",
        help="for a case at the most, if medians are not known to 3 %% sooner (default: %(default)s)",
    )
    soak = "soak: so many seconds for a case, whatever is known"
    until.add_argument("--duration", type=positive_integer, metavar="N", help=soak)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the result as one JSON object")
    output.add_argument("--csv", action="store_true", help="print a line for each case and stage")
    add("--html", type=Path, metavar="FILE", help="write a report, one file for any browser")
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """Every option of ``fusion-bench compare``."""
    parser = argparse.ArgumentParser(prog="fusion-bench compare", description="Tell what changed between two results.")
    add = parser.add_argument
    add("before", type=Path, help="file that fusion-bench --json wrote")
    add("after", type=Path, help="the same, later")
    add("--fail-above", type=_share, metavar="PERCENT", help="exit code 1 if something is slower by more, e.g. 5%%")
    add("--json", action="store_true", help="print the comparison as one JSON object")
    return parser


def _devices(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if wrong := [name for name in names if name not in (AUTO, *NAMES)]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join((AUTO, *NAMES))}")
    if AUTO in names and len(names) > 1:
        raise argparse.ArgumentTypeError(f"{AUTO} is one of the others; name it alone, or those that you mean")
    return names


def _share(text: str) -> float:
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*%?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage such as 5%")
    return float(match[1]) / 100


def _bench(arguments: argparse.Namespace) -> int:
    bundle = open_bundle(arguments.bundle)
    if arguments.html is not None:
        check_output_file(arguments.html)
    threads = max(arguments.threads)
    check_threads(threads, "--threads")
    if arguments.image is not None:
        load_image(arguments.image)  # which refuses what is no picture
    gpu = None if arguments.backend == ("cpu",) or bundle.manifest.target == "cpu" else find_gpu()
    machine = machine_facts(gpu)
    runs: list[Run] = []
    with TemporaryDirectory() as folder, ClockWatch(gpu) as watch:
        picture = Path(folder) / "picture.jpg" if arguments.image is None else Path(arguments.image)
        if arguments.image is None:
            make_up_picture(picture)
        wanted = _wanted(arguments, picture)
        for device, count in dict.fromkeys(product(arguments.backend, arguments.threads)):
            runs += bench(bundle, device, count, wanted, gpu)
    rates = {device: device_rates(device, threads, runs) for device in dict.fromkeys(run.case.device for run in runs)}
    result = Result(
        schema_version=SCHEMA_VERSION,
        producer=producer(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=arguments.command,
        bundle=_bundle_facts(bundle),
        machine=replace(machine, throttled=watch.throttled, clocks=watch.clocks),
        rates=rates,
        measured=tuple(measured(bundle.manifest, run, rates[run.case.device]) for run in runs),
    )
    sys.stdout.write(result.to_text() if arguments.json else table.csv(result) if arguments.csv else table.text(result))
    if arguments.html is not None:
        write_whole(arguments.html, html_report(result))
    return 0


def _bundle_facts(bundle: Bundle) -> BundleFacts:
    manifest = bundle.manifest
    return BundleFacts(
        source=manifest.source,
        target=manifest.target,
        precision=manifest.precision,
        size=manifest.size,
        digest=bundle_digest(bundle),
        max_context=manifest.max_context,
    )


def _wanted(arguments: argparse.Namespace, picture: Path) -> Wanted:
    return Wanted(
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
