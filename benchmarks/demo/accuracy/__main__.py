"""Accuracy of a demo checkpoint on held-out questions: by weight format, guide, detail, CPU tier and part.

    python -m fusion_edge.benchmarks.demo.accuracy --work FOLDER --table formats --json FILE

The loss of a row is against the table's base on the same questions. Intervals (95 %) resample pictures. Bundles,
samples and finished rows in ``--work`` are reused: a stopped run resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fusion_edge.benchmarks.demo import CHECKPOINT
from fusion_edge.benchmarks.demo.accuracy.held_out import QUESTIONS_PER_PICTURE
from fusion_edge.benchmarks.demo.accuracy.report import Results, comparisons, table
from fusion_edge.benchmarks.demo.accuracy.schedule import run, stages
from fusion_edge.benchmarks.demo.accuracy.tables import TABLES, Row, Table
from fusion_edge.benchmarks.demo.accuracy.work import Work
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.resources import usable_processors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.demo.accuracy", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="what demo.train wrote (default: the committed one)")
    add("--work", type=Path, required=True, help="folder for samples, bundles and results; finished ones are reused")
    add("--table", choices=TABLES, action="append", help="what to measure, repeatable (default: all)")
    add(
        "--questions",
        type=positive_integer,
        default=4000,
        help="least number of questions, five a picture (default: %(default)s)",
    )
    add(
        "--chosen",
        type=positive_integer,
        default=500,
        help="number of questions, the first ones, that are also asked with choices (default: %(default)s)",
    )
    add(
        "--calibrating",
        type=positive_integer,
        default=128,
        help="number of samples of the training split that calibrate (default: %(default)s)",
    )
    add(
        "--processes",
        type=positive_integer,
        default=usable_processors(),
        help="number of rows measured at a time (default: one a processor)",
    )
    add("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    work = Work(options.work, options.checkpoint, options.questions, options.chosen, options.calibrating)
    work.open()
    tables = {name: _possible(TABLES[name]) for name in options.table or TABLES}
    machine = machine_info(None)
    measurements = [one.base for one in tables.values()]
    measurements += [row.measurement for one in tables.values() for row in one.rows]
    run(stages(measurements, work), options.processes)
    results = Results(work)
    rows = {
        name: list(filter(None, (results.figures(row, one.base) for row in one.rows))) for name, one in tables.items()
    }
    notes = {name: comparisons(name, results) for name in tables}
    if options.json is not None:
        result = {
            "questions": work.count * QUESTIONS_PER_PICTURE,
            "chosen": min(options.chosen, work.count * QUESTIONS_PER_PICTURE),
            "calibrating": options.calibrating,
            "most_frequent_answer_of_each_kind": results.guessed(),
            "machine": asdict(machine),
            "tables": {name: [asdict(row) for row in of_table] for name, of_table in rows.items()},
            "comparisons": {name: [asdict(note) for note in of_table] for name, of_table in notes.items()},
        }
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n".join(table(name, rows[name], notes[name]) for name in tables))
    sys.stdout.write(f"\nThe most frequent answer of each kind of question is right for {results.guessed():.1%}.\n")
    return 0


def _possible(table: Table) -> Table:
    """Return a table without tiers that this machine lacks."""
    here = cpu_kernels.tiers() if cpu_kernels.library() else ()

    def is_possible(row: Row) -> bool:
        if row.measurement.tier in (None, *here):
            return True
        sys.stderr.write(f"{row.label}: not on this machine\n")
        return False

    return Table(tuple(filter(is_possible, table.rows)), table.base)


if __name__ == "__main__":
    sys.exit(main())
