"""Processors and memory that a process may use, from files of Linux."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.demo_model import OTHER_ANSWER, OTHER_QUESTION, PICTURE
from support.paths import DEMO_CHECKPOINT

from fusion_edge.export import cli as export_cli
from fusion_edge.runtime import UsageError, load
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.system import memory_limits
from fusion_edge.runtime.system.resources import (
    available_memory,
    check_threads,
    is_out_of_memory,
    not_enough_memory,
    usable_processors,
)

MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: 5000000 kB\n"
V1 = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n"
V2 = "0::/system.slice/robot.service\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root without limits and with eight processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("fusion_edge.runtime.system.resources.address_space", lambda: None)
    put(tmp_path, {"proc/meminfo": MEMINFO})
    return tmp_path


def put(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="ascii")


@pytest.mark.parametrize(
    ("cgroup", "files", "processors"),
    [
        ("", {}, 8),
        (V2, {"cpu.max": "max 100000\n"}, 8),
        (V2, {"cpu.max": "200000 100000\n"}, 2),
        (V2, {"cpu.max": "150000 100000\n"}, 2),
        (V2, {"cpu.max": "10000 100000\n"}, 1),
        (V2, {"cpu.max": "9900000 100000\n"}, 8),
        (V2, {"system.slice/cpu.max": "300000 100000\n", "system.slice/robot.service/cpu.max": "max 100000\n"}, 3),
        (V2, {"system.slice/cpu.max": "300000 100000\n", "system.slice/robot.service/cpu.max": "100000 100000\n"}, 1),
        (V2, {"unified/system.slice/cpu.max": "300000 100000\n"}, 3),
        (V2, {"cpu.max": ""}, 8),
        (V2, {"cpu.max": "200000 0\n"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "1\n", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "9\n"}, 1),
    ],
)
def test_processors(machine: Path, cgroup: str, files: dict[str, str], processors: int) -> None:
    put(machine, {"proc/self/cgroup": cgroup} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert usable_processors(machine) == processors


@pytest.mark.parametrize(
    ("cgroup", "files", "available"),
    [
        ("", {}, 5_120_000_000),
        (V2, {"memory.max": "max\n", "memory.current": "1000\n"}, 5_120_000_000),
        (V2, {"memory.max": "9000\n", "memory.current": "1000\n"}, 8000),
        (V2, {"memory.max": "9000", "memory.current": "8500", "memory.stat": "anon 9\ninactive_file 400\n"}, 900),
        (V2, {"system.slice/memory.max": "700\n", "system.slice/memory.current": "900\n"}, 0),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "1\n"}, None),
        (V1, {"memory/docker/abc/memory.limit_in_bytes": "5", "memory/docker/abc/memory.usage_in_bytes": "3"}, 2),
    ],
)
def test_memory(machine: Path, cgroup: str, files: dict[str, str], available: int | None) -> None:
    put(machine, {"proc/self/cgroup": cgroup} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_memory(machine) == (5_120_000_000 if available is None else available)


def test_limits_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 50 if kind == resource.RLIMIT_AS else -1, -1))
    assert (1 << 50) - (memory_limits.address_space() or 0) == pytest.approx(pages * memory_limits.PAGE_BYTES, rel=0.2)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (-1, -1))
    assert memory_limits.address_space() is None


def test_this_machine() -> None:
    assert 1 <= usable_processors() <= len(os.sched_getaffinity(0))
    assert 0 < available_memory() < 1 << 50


def test_out_of_memory_errors() -> None:
    for text in ("std::bad_alloc", "Cannot allocate memory", "can't allocate memory", "Failed to allocate 5 bytes"):
        assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("Invalid rank for input"))
    message = not_enough_memory("load a.onnx", 1_200_000_000)
    assert message.startswith("There is not enough memory to load a.onnx (1,200 MB are needed, ")
    assert not_enough_memory("run llm", None, on_host=False) == "There is not enough memory to run llm"


# Threads ----------------------------------------------------------------------------------------------------


def test_more_threads_than_processors(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_edge.runtime.system.resources.usable_processors", lambda: 2)
    check_threads(2)
    with pytest.raises(UsageError, match="threads is 3; choose at most 2, the processors"):
        load(tiny_bundle, threads=3)
    assert cli_run.main([str(tiny_bundle), "--image", "x", "--ask", "What?", "--threads", "99999"]) == 2
    assert "threads is 99999; choose at most 2" in capsys.readouterr().err


def test_an_export_uses_the_allowed_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[int | None] = []
    begin = ThreadPoolExecutor.__init__

    def init(self: ThreadPoolExecutor, max_workers: int | None = None, *arguments: Any) -> None:
        pools.append(max_workers)
        begin(self, max_workers, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "__init__", init)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert export_cli.main([str(DEMO_CHECKPOINT), "-o", str(tmp_path / "b")]) == 0
    assert set(pools) == {usable_processors()}


# Memory limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["-v", "-d"])
def test_every_memory_limit_gives_an_answer_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, tmp_path: Path
) -> None:
    """Limits from the minimum of Python to a sufficient one: never an abort, a traceback or a wrong reason."""
    bundle = tmp_path / "bundle"
    assert export_cli.main([str(DEMO_CHECKPOINT), "-o", str(bundle)]) == 0
    command = f"{sys.executable} -c 'import sys; from fusion_edge.runtime.cli.entry import run; sys.exit(run())'"
    command += f" {bundle} --image {PICTURE} --ask '{OTHER_QUESTION}' --threads 1"
    least = memory_limits.LIBRARY_BYTES + memory_limits.PROCESSOR_BYTES * len(os.sched_getaffinity(0))
    codes = []
    for megabytes in (30, 100, 200, 300, least // 2**20 + 15, least // 2**20 + 60, 2000):
        script = f"ulimit {kind} {megabytes << 10}; exec {command}"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=False)
        codes.append(done.returncode)
        if done.returncode == 0:
            assert (done.stdout.strip(), done.stderr) == (OTHER_ANSWER, "")
        else:
            assert done.returncode == 1
            assert done.stderr.startswith("error: There is not enough memory to ")
            assert len(done.stderr.splitlines()) == 1
    assert codes[-1] == 0
