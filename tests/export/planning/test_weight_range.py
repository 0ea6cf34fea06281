"""Weights beyond the range of float16, the dtype of scales and 16-bit weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.quant.formats import CODEBOOKS, GROUPED, WeightFormat
from fusion_edge.quant.gptq import FactorizedHessian, gptq, round_to_nearest
from fusion_edge.quant.packing import check_range, dequantize, quantize
from fusion_edge.runtime.errors import FusionError

Refused = Callable[..., str]
NAME, STORED = "llm.layers.1.mlp.down", "model.layers.1.mlp.down_proj.weight"
EVEN = [WeightFormat(kind, 32) for kind in GROUPED if kind not in CODEBOOKS] + [WeightFormat("w8a8")]


@pytest.mark.parametrize("fmt", EVEN, ids=str)
@pytest.mark.parametrize("signs", [[1, 1], [-1, -1], [1, -1]])
def test_values_up_to_the_limit_do_not_overflow(fmt: WeightFormat, signs: list[int]) -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[:, ::2], rows[:, 1::2] = signs[0] * fmt.max_value, signs[1] * fmt.max_value
    check_range("w", rows, fmt)
    weights = torch.from_numpy(rows)
    inputs = FactorizedHessian(torch.eye(64, dtype=torch.float64))
    for values in (
        dequantize(quantize(rows, fmt), fmt, 64),
        round_to_nearest(weights, fmt).values.numpy(),
        gptq(weights, inputs, fmt).values.numpy(),
    ):
        np.testing.assert_allclose(values, rows, rtol=0.1)


@pytest.mark.parametrize("fmt", [*EVEN, WeightFormat("fp16")], ids=str)
def test_values_beyond_the_limit_are_refused(fmt: WeightFormat) -> None:
    with pytest.raises(FusionError, match=f"w holds values up to .*; the range of {fmt} ends at"):
        check_range("w", np.array([[0, -1.001 * fmt.max_value]], np.float32), fmt)


@pytest.mark.parametrize("fmt", [WeightFormat("fp32"), WeightFormat("nf4", 64)], ids=str)
def test_float32_has_no_limit(fmt: WeightFormat) -> None:
    check_range("w", np.array([[3e38]], np.float32), fmt)


@pytest.mark.parametrize(
    "options",
    [
        ["--int4"],
        ["--fp16"],
        ["--rule", f"{NAME}=uint4:32"],
        ["--int4", "--calibrate"],
        ["--int4", "--bits", "31", "--calibrate"],
        ["--rule", f"{NAME}=fp16", "--calibrate"],
    ],
)
def test_an_export_names_the_weight(tmp_path: Path, refused: Refused, options: list[str]) -> None:
    config = replace(TINY, vision=replace(TINY.vision, patch_size=24))
    checkpoint = write_checkpoint(tmp_path / "FUSION-large", config)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = checkpoint / index["weight_map"][STORED]
    tensors = load_file(shard)
    tensors[STORED] = tensors[STORED].astype(np.float32)
    tensors[STORED][3, 5] = -1e6
    save_file(tensors, shard)
    if options[-1] == "--calibrate":
        write_samples(tmp_path / "data", 8)
        options = [*options, str(tmp_path / "data"), "--vision", "int8-weights"]
    message = refused(cli.main, checkpoint, "-o", tmp_path / "bundle", *options)
    assert f"{NAME}.weight holds values up to 1e+06" in message
    assert not (tmp_path / "bundle").exists()
