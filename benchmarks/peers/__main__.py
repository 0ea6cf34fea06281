"""fusion-edge side by side with other engines on one machine.

    python -m fusion_edge.benchmarks.peers.__main__ llm --bundle ours=DIR --genai genai-b32=DIR

Each runner needs its peer, in this environment or in the one that ``--python RUNNER=PATH`` names, and there fusion-edge
without what it depends on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fusion_edge.benchmarks.peers import llm as llm_peers
from fusion_edge.benchmarks.peers import vision as vision_peers
from fusion_edge.benchmarks.peers.harness import add_options, run
from fusion_edge.runtime.cli.command import run_command

COMPARISONS = {"llm": llm_peers.COMPARISON, "vision": vision_peers.COMPARISON}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.peers.__main__",
        description="Compare fusion-edge with other engines on this machine.",
    )
    subparsers = parser.add_subparsers(dest="comparison", required=True)
    for name, comparison in COMPARISONS.items():
        add_options(
            subparsers.add_parser(name, help=comparison.description, description=comparison.description), comparison
        )
    arguments = parser.parse_args(argv)
    return run_command(lambda arguments: run(COMPARISONS[arguments.comparison], arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
