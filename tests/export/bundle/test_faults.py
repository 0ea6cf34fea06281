"""Kills, signals and failing writes at an export's system calls. ``python tests/faults.py`` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import ERRORS, OLD, PLACES, SHORT, SIGNALS, Place, inject, trace

from fusion_edge.export import cli


@pytest.fixture(scope="module")
def replaced(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replaced") / "bundle"
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), f"--{OLD}"]) == 0
    return folder


def tried(kind: str, name: str, calls: list[int]) -> list[int]:
    """Return the call numbers at which to try a kind of fault, out of ``calls`` of one name."""
    if kind == SHORT:
        return calls[:2] if name in ("pwrite", "write") else []
    if kind == "SIGKILL" and name in ("rename", "replace"):
        return calls
    return [calls[len(calls) // 2]]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kinds", [("SIGKILL",), SIGNALS[1:2], ("ENOSPC", SHORT)], ids=["kills", "SIGTERM", "writes"])
def test_export_survives_faults(
    kinds: tuple[str, ...], where: str, tiny_checkpoint: Path, replaced: Path, tmp_path: Path
) -> None:
    """The old or the new bundle is complete, and the next export leaves nothing behind."""
    place = Place(tiny_checkpoint, replaced, tmp_path, *PLACES[where])
    names = trace(place)
    differing = ["rename"] if where == "a folder without exchange" else dict.fromkeys(names)
    wrong = [
        f"{kind} at call {number} ({name}): {verdict}"
        for kind in kinds
        for name in differing
        for number in tried(kind, name, [i for i, one in enumerate(names) if one == name])
        if (verdict := inject(kind, number, place))
    ]
    assert not wrong


@pytest.mark.parametrize("kind", [*SIGNALS[2:], *ERRORS[1:]])
def test_each_fault_kind(kind: str, tiny_checkpoint: Path, replaced: Path, tmp_path: Path) -> None:
    place = Place(tiny_checkpoint, replaced, tmp_path)
    assert inject(kind, trace(place).index("pwrite"), place) == ""


def test_inject_detects_a_fault(
    tiny_checkpoint: Path, replaced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old bundle that is not restored is reported."""
    place = Place(tiny_checkpoint, replaced, tmp_path, *PLACES["a folder without exchange"])
    names = trace(place)
    second = names.index("rename", names.index("rename") + 1)
    monkeypatch.setattr("fusion_edge.export.bundle.atomic_folder._recover_replaced", lambda *_: None)
    assert "the next export" in inject("SIGKILL", second, place)
