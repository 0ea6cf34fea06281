"""Compare fusion-edge with other inference engines on one machine.

    python -m fusion_edge.benchmarks.peers llm --bundle ours=DIR --genai genai-b32=DIR

A runner needs its engine in this environment, or in the one of ``--python RUNNER=PATH`` together with fusion-edge
(``pip install --no-deps``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fusion_edge.benchmarks.peers import llm, vision
from fusion_edge.benchmarks.peers.harness import add_options, run
from fusion_edge.runtime.cli.command import run_command

COMPARISONS = {"llm": llm.COMPARISON, "vision": vision.COMPARISON}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.peers",
        description="Compare fusion-edge with other inference engines on this machine.",
    )
    subparsers = parser.add_subparsers(dest="comparison", required=True)
    for name, comparison in COMPARISONS.items():
        text = comparison.description
        add_options(subparsers.add_parser(name, help=text, description=text), comparison)
    arguments = parser.parse_args(argv)
    return run_command(lambda arguments: run(COMPARISONS[arguments.comparison], arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
