"""Jetsons and their contiguous memory, from files of Linux."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusion_edge.runtime.system import jetson
from fusion_edge.runtime.system.jetson import ContiguousMemory, contiguous_memory, largest_blocks, this_jetson
from fusion_edge.runtime.system.resources import memory_fields

PAGE = 4096
SERVER = """\
Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      3 
Node 0, zone    DMA32    385    356    521    389    293    145     61     43     19     26    709 
Node 0, zone   Normal  19775   9153   3354   4010   3004    493     53     25      5      0   1016 
"""  # noqa: W291 - as Linux writes it
FRAGMENTED = """\
Node 0, zone    DMA32    118    156    996    790    254     88     47     13      0      0      0
Node 0, zone   Normal   2447   3506    613     31      0      0      0      0      0      0      0
"""
BOARD = """\
MemTotal:         927976 kB
MemFree:          703692 kB
Percpu:             1104 kB
CmaTotal:         262144 kB
CmaFree:          256744 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
"""Lines of a 64-bit ARM board with the default CMA."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of an Orin Nano, with the numbers of the samples above."""
    monkeypatch.setattr(jetson, "PAGE_BYTES", PAGE)
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    board = b"nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0"
    (tmp_path / "proc/device-tree/compatible").write_bytes(board)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    (tmp_path / "proc/buddyinfo").write_text(FRAGMENTED)
    (tmp_path / "proc/meminfo").write_text(BOARD)
    return tmp_path


@pytest.mark.parametrize(
    ("buddyinfo", "page", "expected"),
    [
        (SERVER, PAGE, (1024 * PAGE, 3 + 709 + 1016)),
        (FRAGMENTED, PAGE, (128 * PAGE, 13)),
        (
            "Node 0, zone   Normal      9      0      2 \nNode 1, zone   Normal      0      0      5 \n",
            65536,
            (262144, 7),
        ),
        ("Node 0, zone   Normal      0      0      0 \n", PAGE, (0, 0)),
        ("", PAGE, (0, 0)),
    ],
)
def test_largest_blocks(buddyinfo: str, page: int, expected: tuple[int, int]) -> None:
    assert largest_blocks(buddyinfo, page) == expected


def test_memory_fields() -> None:
    """Counts without a unit are no sizes."""
    assert memory_fields(BOARD) == {
        "MemTotal": 950_247_424,
        "MemFree": 720_580_608,
        "Percpu": 1_130_496,
        "CmaTotal": 268_435_456,
        "CmaFree": 262_905_856,
        "Hugepagesize": 2_097_152,
    }


def test_contiguous_memory(root: Path) -> None:
    memory = contiguous_memory(root)
    assert memory == ContiguousMemory(128 * PAGE, 13, 262_905_856, 268_435_456)
    assert memory.largest == 262_905_856
    assert str(memory) == "13 free blocks of 0.5 MB; CMA has 263 of 268 MB free"


def test_contiguous_memory_without_cma(root: Path) -> None:
    (root / "proc/buddyinfo").write_text(SERVER)
    (root / "proc/meminfo").write_text("MemTotal:         927976 kB\n")
    memory = contiguous_memory(root)
    assert memory.largest == 1024 * PAGE
    assert str(memory) == "1728 free blocks of 4.2 MB; CMA has 0 of 0 MB free"


def test_contiguous_memory_of_this_machine() -> None:
    memory = contiguous_memory()
    assert memory.block % os.sysconf("SC_PAGE_SIZE") == 0
    assert memory.cma_free <= memory.cma_total


def test_a_jetson(root: Path) -> None:
    here = this_jetson(root)
    assert here is not None
    assert (here.model, here.memory) == ("NVIDIA Jetson Orin Nano Developer Kit", 950_247_424)


def test_other_machines(root: Path, tmp_path: Path) -> None:
    (root / "proc/device-tree/compatible").write_bytes(b"raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert this_jetson(root) is None
    assert this_jetson(tmp_path / "without") is None
