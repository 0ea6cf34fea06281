"""``python -m tests.fuzz``: the campaign's command line."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from fuzz.campaign import RETRY_PATIENCE, Campaign
from fuzz.children import Batch, Children
from fuzz.judge import Kind
from fuzz.kinds import kinds

MEMORY_FOLDER = Path("/dev/shm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if anything failed."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(words)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None))
    try:
        return _replay(arguments, scratch) if arguments.replay else _campaign(arguments, scratch, words)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Run mutants of every input; exit code 1 if any failed.",
    )
    add = parser.add_argument
    add("--minutes", type=float, metavar="M", help="run time in minutes (default: until --count, or one minute)")
    add("--count", type=int, metavar="N", help="number of mutants, over all kinds")
    add(
        "--kind",
        type=_kinds,
        metavar="KIND[,KIND...]",
        help=f"kinds: {', '.join(kinds())} (default: all quick ones)",
    )
    add("--seed", type=int, metavar="N", help="seed of the campaign (default: the date in UTC, such as 20260131)")
    add("--jobs", type=int, default=2, metavar="N", help="number of processes (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add("--replay", metavar="KIND:SEED", help="run one mutant, and print its changes and the verdict")
    add("--keep", type=Path, metavar="FOLDER", help="copy the files of the replayed mutant to FOLDER")
    return parser


def _kinds(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in kinds():
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(kinds())}")
    return names


def _prepared(names: Sequence[str], scratch: Path) -> dict[str, Kind]:
    chosen = {name: kinds()[name] for name in names}
    for name, kind in chosen.items():
        folder = scratch / f"base-{name}"
        folder.mkdir()
        kind.prepare(folder)
    return chosen


def _campaign(arguments: argparse.Namespace, scratch: Path, words: Sequence[str]) -> int:
    names = arguments.kind or [name for name, kind in kinds().items() if kind.share]
    seed = int(datetime.now(timezone.utc).strftime("%Y%m%d")) if arguments.seed is None else arguments.seed
    minutes = 1.0 if arguments.minutes is None and arguments.count is None else arguments.minutes
    prepared = _prepared(names, scratch)
    campaign = Campaign(prepared, Children(prepared, arguments.jobs, scratch), seed)
    started = time.monotonic()
    limit = None if minutes is None else 60 * minutes
    try:
        for _ in campaign.run(arguments.count, limit):
            _show(campaign, started, arguments.count, limit)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
    seconds = time.monotonic() - started
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    result = {"command": shlex.join(["python", "-m", "tests.fuzz", *words])} | campaign.result(seconds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, tally in campaign.tallies.items():
        pace = 1000 * tally.seconds / max(tally.mutants, 1)
        sys.stdout.write(
            f"{name:12} {tally.mutants:7} mutants, {tally.accepted} accepted, {pace:.1f} ms each, slowest "
            f"{tally.slowest:.2f} s (unchanged {tally.unchanged_seconds:.3f} s), at most +{tally.growth >> 20} MB\n"
        )
    sys.stdout.write(f"{campaign.mutants} mutants in {seconds:.0f} s, seed {seed}: {result['failures']} failures\n")
    sys.stdout.write(campaign.summary())
    return 1 if campaign.failures else 0


_shown = 0.0


def _show(campaign: Campaign, started: float, count: int | None, limit: float | None) -> None:
    """Show progress and the remaining time once a second, on a terminal."""
    global _shown
    now = time.monotonic()
    if not sys.stderr.isatty() or now - _shown < 1:
        return
    _shown = now
    spent, done = now - started, campaign.mutants
    ends = [spent * count / done] if count else []
    left = max(min(ends + ([limit] if limit else [])) - spent, 0)
    failed = sum(len(failure.seeds) for failure in campaign.failures.values())
    sys.stderr.write(f"\r{done} mutants, {done / spent:.0f}/s, {failed} failures, {left / 60:.1f} minutes left   ")
    sys.stderr.flush()


def _replay(arguments: argparse.Namespace, scratch: Path) -> int:
    name, _, seed = arguments.replay.partition(":")
    if name not in kinds() or not seed.isdecimal():
        sys.stderr.write(f"error: {arguments.replay} is not a KIND:SEED, such as image:3.\n")
        return 2
    if arguments.keep is not None and arguments.keep.exists():
        sys.stderr.write(f"error: {arguments.keep} exists; pass a new folder.\n")
        return 2
    prepared = _prepared([name], scratch)
    children = Children(prepared, 1, scratch, keep=arguments.keep)
    [(_, verdict)] = children.run([Batch(name, [int(seed)], RETRY_PATIENCE)])
    verdict_fields = {key: value for key, value in asdict(verdict).items() if key not in ("changes", "detail")}
    sys.stdout.write("".join(f"changed: {change}\n" for change in verdict.changes))
    sys.stdout.write(f"{json.dumps(verdict_fields)}\n{verdict.detail}\n{verdict.written}")
    return 1 if verdict.failure else 0
