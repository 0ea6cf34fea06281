"""As a script: print the kernels of all plugins, compiled for a Jetson Orin, as JSON.

Triton reads TRITON_INTERPRET when kernels are defined, so a process either compiles them or interprets them.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from fusion_edge.kernels.tensorrt_plugins import DTYPES, PLUGINS
from fusion_edge.kernels.triton.ahead_of_time import compile_kernel

WIDTH = 64


def main() -> None:
    """Print every kernel by operator and type."""
    compiled = {
        f"{plugin.operator} {dtype}": dataclasses.asdict(compile_kernel(plugin.kernel, "87", WIDTH, dtype))
        for plugin in PLUGINS
        for dtype in DTYPES.values()
    }
    sys.stdout.write(json.dumps(compiled))


if __name__ == "__main__":
    main()
