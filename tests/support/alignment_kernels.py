"""As a script: compile the kernels that tests interpret to a folder. Another process: tests have Triton interpret them.

python -m support.alignment_kernels FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.paths import TESTS

from fusion_edge.kernels.triton.ahead_of_time import ARCHITECTURES, KERNELS, build
from fusion_edge.kernels.triton.kernel_folder import write_index

NARROW, WIDE = 208, (3072, 4096)
"""Heads of 13 columns, and those of the models."""
OTHERS = [
    *(("fp16", architecture, WIDE[1]) for architecture in ("87", "120")),
    *((dtype, *one) for dtype in ("bf16", "fp32") for one in (("87", 48), ("120", NARROW))),
]
"""Type, architecture and width of kernels beside those of float16 for all architectures."""
BUILDS = [("fp16", architecture, width) for architecture in ARCHITECTURES for width in (NARROW, WIDE[0])] + OTHERS


def compile_to(folder: Path) -> None:
    """Compile all kernels of :data:`BUILDS`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "support.alignment_kernels", str(folder)]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def main(folder: Path) -> None:
    """Compile the kernels in this process."""
    built = [
        build(folder, kernel, architecture, width, dtype) for dtype, architecture, width in BUILDS for kernel in KERNELS
    ]
    write_index(folder, [one.entry for one in built])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
