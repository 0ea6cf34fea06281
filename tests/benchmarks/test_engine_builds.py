"""``benchmarks.engine_builds``: memory, time and size of builds, each in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fusion_edge.benchmarks import engine_builds
from fusion_edge.benchmarks.engine_builds import BuildResult, table
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny"))


def test_a_build(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle gets no engines, and nothing is left beside it."""
    pytest.importorskip("tensorrt_rtx")
    command = [str(bundle), "--device=12.0", "--parts", "2", f"--json={tmp_path / 'f.json'}"]
    assert engine_builds.main(command) == 0
    assert "\n| 2 | " in capsys.readouterr().out
    facts = json.loads((tmp_path / "f.json").read_text())
    (build,) = facts["builds"]
    assert build["peak_bytes"] > 100_000_000  # TensorRT's libraries
    assert build["cpu_seconds"] > 0
    assert build["engine_bytes"].keys() == {VISION_ENCODER, ALIGNMENT_DECODER, LLM}
    assert min(build["engine_bytes"].values()) > 0
    assert sum(facts["linears_by_format"].values()) > 10
    assert not (bundle / "engines").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "tiny"]


def test_a_build_that_fails(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert engine_builds.main([str(bundle), "--device=7.0"]) == 1
    message = capfd.readouterr().err
    assert "Compute capability 7.0 is too old" in message
    assert message.endswith("error: fusion-build ended with exit code 1; see its error above.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_table() -> None:
    result = BuildResult(4, 2_670_000_000, 150.0, 134.2, {"llm": 2_000_000_000, "vision_encoder": 900_000_000})
    assert table([result]).splitlines()[-1] == "| 4 | 2.67 GB | 134 s | 2.90 GB |"
