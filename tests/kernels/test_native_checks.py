"""Checks of every tier of the CPU kernels in C++, on this processor and on emulated ones."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from support.paths import ROOT

TOOLS = {
    "here": ("g++",),
    "aarch64": ("aarch64-linux-gnu-g++", "qemu-aarch64"),
    "x86-64": ("g++", "qemu-x86_64"),
}
"""Commands that the checks of a processor need."""


def check(processor: str) -> subprocess.CompletedProcess[str]:
    for tool in TOOLS.get(processor, ()):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    command = [str(ROOT / ".ci/processors"), processor]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("processor", TOOLS)
def test_kernels_of_all_tiers(processor: str) -> None:
    done = check(processor)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count(" 0 failures") == done.stdout.count(" failures") > 0


def test_a_processor_without_a_tier_fails() -> None:
    assert check("here").returncode == 0
    program = ROOT / "build/processors/g++/kernel_checks"
    done = subprocess.run([program, "another tier"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.endswith("FAILED: this processor has other tiers; expected: 'another tier'\n")


def test_unknown_processor() -> None:
    done = check("sparc")
    assert (done.returncode, done.stderr) == (2, "sparc is no processor; expected here, aarch64 or x86-64.\n")
