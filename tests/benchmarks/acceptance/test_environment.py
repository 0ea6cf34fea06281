"""Memory as the kernel of a Jetson reports it."""

from __future__ import annotations

import os
from pathlib import Path

from fusion_edge.benchmarks.acceptance.environment import largest_free_block, memory_facts

PAGE = os.sysconf("SC_PAGE_SIZE")
ORIN_NANO = """\
Node 0, zone      DMA     12      7      3      1      0      2      1      0      1      0      0
Node 0, zone   Normal   3125   1804    911    302    104     31      9      2      0      0      0
"""


def test_largest_free_block() -> None:
    assert largest_free_block(ORIN_NANO) == 256 * PAGE  # order 8 of zone DMA
    assert largest_free_block(ORIN_NANO.splitlines()[1]) == 128 * PAGE
    assert largest_free_block("Node 0, zone Normal 1 0 0 0\n") == PAGE
    assert largest_free_block("Node 0, zone Normal 0 0 0 0\n") == 0
    assert largest_free_block("") == 0


def test_memory_of_a_jetson(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/buddyinfo").write_text(ORIN_NANO)
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:        7802132 kB\nMemAvailable:    6645184 kB\nSwapFree:  100 kB\n"
        "CmaTotal:         262144 kB\nCmaFree:           81920 kB\n"
    )
    assert memory_facts(tmp_path) == {
        "available": 6645184 * 1024,
        "cma_total": 268435456,
        "cma_free": 83886080,
        "swap_free": 102400,
        "largest_free_block": 256 * PAGE,
    }


def test_memory_without_cma(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/buddyinfo").write_text("")
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    4 kB\n")
    assert memory_facts(tmp_path) == {"available": 4096, "largest_free_block": 0}
