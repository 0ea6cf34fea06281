"""The command that checks every tier of the CPU kernels in C++. CI runs it: the builds take minutes."""

from __future__ import annotations

import subprocess

from support.paths import ROOT


def test_unknown_processor() -> None:
    done = subprocess.run([ROOT / ".ci/processors", "sparc"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "sparc is no processor; expected here, aarch64 or x86-64.\n")
