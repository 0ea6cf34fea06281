"""``benchmarks/scenes.py`` on a tiny bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion_edge.benchmarks import scenes
from fusion_edge.export import cli


def test_times_of_every_level(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle offers 16 latents, those of the lowest level, and has fewer patches than its image tokens."""
    assert scenes.main([str(tiny_bundle), "--rounds", "2", "--json", str(tmp_path / "result.json")]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "detail"
    assert row.split()[:3] == ["fast", "16", "16"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "python -m fusion_edge.benchmarks.scenes BUNDLE --rounds 2"
    assert result["cache"] == "float32"
    (one,) = result["details"].values()
    for kind in ("first_token", "exact_followup", "look", "scene_followup"):
        assert len(one[kind]) == 2
        assert min(one[kind]) > 0


def test_a_bundle_without_a_level(tiny_checkpoint: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    bundle = tmp_path / "bundle"
    assert cli.main([str(tiny_checkpoint), "-o", str(bundle), "--query-len", "4"]) == 0
    assert refused(scenes.main, bundle, code=2) == "error: The bundle offers 4 latents; expected 144, 64 or 16.\n"
