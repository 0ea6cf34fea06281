"""One scale per output channel: ``--group-size channel``, run through the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import TINY, write_checkpoint
from support.parity import assert_computes_its_weights

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.checkpoint.weights import read_parameter
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.runtime.bundle.manifest import QUANTIZATION
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info

Refused = Callable[..., str]
LINEAR = "llm.layers.1.mlp.down"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with 200 inputs to the LLM's ``mlp.down``: a whole block and a partial one."""
    config = replace(TINY, vision=replace(TINY.vision, patch_size=24), language=replace(TINY.language, mlp_width=200))
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "FUSION-tiny", config)


@pytest.mark.parametrize(("more", "kind"), [((), "int4"), (("--asym",), "uint4")])
def test_calibrated_weights_have_one_scale_per_row(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], kind: str
) -> None:
    data, output = tmp_path / "data", tmp_path / "bundle"
    write_samples(data, 8)
    command = [str(checkpoint), "-o", str(output), "--group-size", "channel", "--accuracy-level", "0"]
    assert cli.main([*command, "--vision", "fp16", "--calibrate", str(data), *more]) == 0
    assert f"{kind}:channel" in capsys.readouterr().out
    bundle = open_bundle(output)
    assert bundle.manifest.weights[LINEAR] == f"{kind}:channel"
    assert bundle.manifest.weights["llm.embed_tokens"] == "int8:channel"
    linears = json.loads((output / QUANTIZATION).read_text(encoding="utf-8"))["linears"]
    assert [one["format"] for one in linears if one["name"] == LINEAR] == [f"{kind}:channel"]
    assert cli_info.main([str(output)]) == 0
    assert f"in {kind}:channel" in capsys.readouterr().out
    for row in read_parameter(BundleWeights(bundle), f"{LINEAR}.weight"):
        steps = np.unique(np.diff(np.unique(row)).round(6))
        multiples = np.asarray(steps / steps[0], np.float64)
        np.testing.assert_allclose(multiples, np.rint(multiples), rtol=1e-3)
        assert len(np.unique(row)) <= 16
    assert_computes_its_weights(output, data / "00000.png")


@pytest.mark.parametrize(
    "options",
    [
        ["--nf4", "--group-size", "channel"],
        ["--rule", f"{LINEAR}=nf4:channel"],
        ["--group-size", "channel", "--rule", f"{LINEAR}=fp4"],
    ],
)
def test_codebooks_refuse_per_channel(checkpoint: Path, tmp_path: Path, refused: Refused, options: list[str]) -> None:
    message = refused(cli.main, checkpoint, "-o", tmp_path / "b", *options, code=2)
    assert "cannot have one scale per channel; use one of" in message
    assert not list(tmp_path.iterdir())


def test_formats_without_groups_have_no_group_size(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    rule = f"{LINEAR}=w8a8:channel"
    assert "Unknown weight format" in refused(cli.main, checkpoint, "-o", tmp_path / "b", "--rule", rule, code=2)


@pytest.mark.parametrize("size", ["row", "0", "48", "-1", ""])
def test_invalid_group_sizes(checkpoint: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(checkpoint), "--dry-run", f"--group-size={size}"])
    assert caught.value.code == 2
    assert f"{size!r} is not one of 32, 64, 128, channel" in capsys.readouterr().err
