"""Weights that are read in and locked: all pages, no copies, and every refusal."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.locked_memory import locked_bytes

from fusion_edge.runtime import Fusion, FusionError, load
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.system import mapped_files
from fusion_edge.runtime.system.mapped_files import MappedRange, file_parts, mapped_ranges, read_in

PAGE = resource.getpagesize()
CAP_IPC_LOCK = 14
PR_CAPBSET_DROP = 24
LOAD = "import sys; from fusion_edge import load; load(sys.argv[1], device='cpu', threads=1, lock_memory=True)"


def smaps(path: Path) -> Iterator[dict[str, int]]:
    """Yield the kernel's figures of each mapping of a file, in bytes."""
    name = f" {path}".replace("\n", "\\012")
    text = os.fsdecode(Path("/proc/self/smaps").read_bytes())
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE):
        if entry.partition("\n")[0].endswith(name):
            yield {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", entry, re.MULTILINE)}


@pytest.mark.parametrize("name", ["weights.data", "two words.data", "a\nb.data", "\udcff.data"])
def test_ranges_and_reading(tmp_path: Path, name: str) -> None:
    path, link, other = tmp_path / name, tmp_path / "link", tmp_path / "other.data"
    for file in (path, other):
        file.write_bytes(bytes(5 * PAGE + 7))
    link.symlink_to(path)
    whole, part = np.memmap(link, np.uint8, "r"), np.memmap(path, np.uint8, "r", 2 * PAGE, (PAGE,))
    untouched = np.memmap(other, np.uint8, "r")
    assert whole.size == 5 * PAGE + 7
    found = mapped_ranges([link])
    assert all(one.path == link for one in found)
    assert sum(one.size for one in found) == 7 * PAGE
    assert {one.address for one in found} >= {min(whole.ctypes.data, part.ctypes.data)}
    advanced: list[int] = []
    read_in(found, advanced.append)
    assert sum(advanced) == 7 * PAGE
    assert [one["Rss"] for one in smaps(path)] == [one["Size"] for one in smaps(path)] != []
    assert sum(one["Rss"] for one in smaps(other)) == 0
    del untouched


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=12))
def test_parts_are_the_union_of_the_ranges(ranges: list[tuple[int, int]]) -> None:
    path = Path("file")
    parts = file_parts(MappedRange(path, offset, size, 0) for offset, size in ranges).get(path, [])
    covered = [page for offset, size in parts for page in range(offset, offset + size)]
    assert covered == sorted({page for offset, size in ranges for page in range(offset, offset + size)})
    assert all(first + size < second for (first, size), (second, _) in pairwise(parts))


def test_a_model_is_read_in(tiny_bundle: Path) -> None:
    with load(tiny_bundle, device="cpu", threads=1, preload=True):
        for name in ("llm", "vision_encoder", "embeddings"):
            figures = list(smaps(tiny_bundle / f"{name}.data"))
            assert figures
            assert all(one["Rss"] == one["Size"] for one in figures)
        assert locked_bytes() == 0


def test_a_model_is_locked_without_a_copy_until_it_is_closed(tiny_bundle: Path) -> None:
    first = load(tiny_bundle, device="cpu", threads=1, lock_memory=True)
    mapped = mapped_ranges(tiny_bundle.glob("*.data"))
    size = sum(size for parts in file_parts(mapped).values() for _, size in parts)
    assert locked_bytes() == size
    assert sum(one["Anonymous"] for name in tiny_bundle.glob("*.data") for one in smaps(name)) == 0
    second = load(tiny_bundle, device="cpu", threads=1, lock_memory=True)
    assert locked_bytes() == 2 * size
    first.close()
    assert locked_bytes() == size
    del second  # unlocks without close()
    gc.collect()
    assert locked_bytes() == 0


def test_the_commands_lock(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    def record(folder: Path, **options: object) -> Fusion:
        given.append(options)
        return load(folder)

    monkeypatch.setattr(cli_run, "load", record)
    options = ["--image", "absent.png", "--ask=What?", "--preload", "--lock-memory"]
    assert cli_run.main([str(tiny_bundle), *options]) == 1
    assert given == [{"device": "auto", "threads": None, "spin": False, "preload": True, "lock_memory": True}]


# Refusals -----------------------------------------------------------------------------------------------------


def forbid_locking(limit: int) -> None:
    """Let the program that follows lock ``limit`` bytes, also if it is root's."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))


@pytest.mark.parametrize("limit", [0, 8 * PAGE])
def test_a_process_that_may_not_lock(tiny_bundle: Path, limit: int) -> None:
    command = [sys.executable, "-c", LOAD, str(tiny_bundle)]
    failed = subprocess.run(command, preexec_fn=lambda: forbid_locking(limit), capture_output=True, text=True)
    message = failed.stderr.splitlines()[-1]
    told = re.fullmatch(
        r"fusion_edge\S+FusionError: lock_memory needs to lock ([\d,]+) bytes, and this process may lock "
        rf"{limit:,}; raise the limit \(ulimit -l (\d+), LimitMEMLOCK=(\d+) in a systemd unit\), or drop lock_memory\.",
        message,
    )
    assert told is not None, message
    needed, kilobytes, size = (int(number.replace(",", "")) for number in told.groups())
    assert needed == size > limit
    assert kilobytes == -(-size // 1024)


def test_a_refusal_closes_the_model(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_files, "_call", failing(errno.EAGAIN, "mlock2"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    with pytest.raises(FusionError, match=r"^There is not enough memory to lock the weights \(.*\): Resource temp"):
        load(tiny_bundle, device="cpu", threads=1, lock_memory=True)
    gc.collect()
    assert mapped_ranges(tiny_bundle.glob("*.data")) == []
    assert locked_bytes() == 0


def failing(code: int, name: str) -> object:
    """Return a ``_call`` whose function ``name`` fails."""

    def call(function: str, *arguments: int) -> None:
        if function == name:
            raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            errno.EINVAL,
            f"Weights cannot be preloaded on Linux {platform.release()}; use 5.14 or later, or drop preload.",
        ),
        (errno.ENOMEM, "There is not enough memory to preload "),
        (errno.EFAULT, r".*\.data cannot be read into memory \(Bad address\); copy or export the bundle again\.$"),
    ],
)
def test_pages_that_cannot_be_read(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    monkeypatch.setattr(mapped_files, "_call", failing(code, "madvise"))
    with pytest.raises(FusionError, match=f"^{message}"):
        load(tiny_bundle, device="cpu", threads=1, preload=True)


def test_a_range_that_another_thread_unmaps(tmp_path: Path) -> None:
    path = tmp_path / "weights.data"
    path.write_bytes(bytes(2 * PAGE))
    mapping = np.memmap(path, np.uint8, "r")
    found = mapped_ranges([path])
    del mapping
    advanced: list[int] = []
    read_in(found, advanced.append)
    assert (len(found), advanced) == (1, [])


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "weights.data"
    path.write_bytes(bytes(4 * PAGE))
    mapping = np.memmap(path, np.uint8, "r")
    os.truncate(path, PAGE)
    with pytest.raises(FusionError, match=r"weights.data cannot be read into memory \(Bad address\)"):
        read_in(mapped_ranges([path]), lambda _: None)
    del mapping
