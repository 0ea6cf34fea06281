"""A bundle beside exact arithmetic on its own weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_edge.benchmarks.demo.exact_arithmetic import main
from fusion_edge.benchmarks.demo.samples import write_samples


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    write_samples(tmp_path / "samples", 2)
    return tmp_path / "samples"


def test_the_reference_has_the_weights_of_the_bundle(
    tiny_bundle: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bundle), str(samples), "--json", "--max-new-tokens=2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["command"].startswith("python -m fusion_edge.benchmarks.demo.exact_arithmetic ")
    assert 0 < result["comparison"]["kl_first_token"] < 0.01  # 8-bit activations; weights of 4 bits cost more
    assert result["comparison"]["same_answer"]["total"] == 2


@pytest.mark.parametrize("option", ["--reference=x", "--revision=main"])
def test_options_of_another_reference_are_refused(
    option: str, tiny_bundle: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bundle), str(samples), option]) == 2
    assert f"{option.split('=')[0]} is not for this comparison" in capsys.readouterr().err
