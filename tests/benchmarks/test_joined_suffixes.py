"""The measurement of joined questions runs, and its ratio is that of its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_edge.benchmarks import joined_suffixes


def test_result(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--bundle",
        str(tiny_bundle),
        "--questions",
        "3",
        "--query-length",
        "4",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert joined_suffixes.main(arguments) == 0
    result = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert (result["questions"], result["latents"], result["prefix_rows"]) == (3, 4, 36)
    assert result["joined_over_separate"] == pytest.approx(result["joined_seconds"] / result["separate_seconds"])
    assert "4 latents: 3 questions take" in capsys.readouterr().out
