"""Check everything that needs a GPU: ``python -m fusion_edge.acceptance`` on a Jetson or beside an RTX card.

``benchmarks/acceptance/`` implements it.
"""

from __future__ import annotations

import sys

from fusion_edge.runtime.cli.entry import start

if __name__ == "__main__":
    sys.exit(start("fusion_edge.benchmarks.acceptance.cli", ("onnx",), "export"))
