"""Bytes that runs on TensorRT move: windows of the KV cache, and INT8 weights fused or dequantized first."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import TINY
from support.paths import DEMO_CHECKPOINT

from fusion_edge.benchmarks.latency.roofline import weight_bytes
from fusion_edge.export import cli
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.memory import estimate
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.export.planning.rules import Rule
from fusion_edge.export.planning.traffic import (
    DEQUANTIZED_TRAFFIC,
    SLICE_TRAFFIC,
    decode_steps,
    decode_windows,
    moved_tokens,
    vision_run,
)
from fusion_edge.quant.formats import WeightFormat

INT8 = ["--rule=llm.lm_head=int8:channel", "--vision=int8-weights"]


@given(st.integers(1, 1 << 20))
def test_windows_cost_less_than_the_whole_cache(capacity: int) -> None:
    *windows, whole = decode_windows(capacity)
    assert whole == capacity
    assert windows == sorted(windows)
    assert all(SLICE_TRAFFIC * size < capacity for size in windows)
    assert (capacity <= 1536) == (not windows)


@given(st.integers(1, 1 << 20))
def test_windows_of_an_int8_cache(capacity: int) -> None:
    """The next window has at most twice the tokens, or 8/3 of them at the end, and at least 4/3."""
    sizes = decode_windows(capacity, has_per_token_scales=True)
    assert sizes[-1] == capacity
    for smaller, larger in pairwise(sizes):
        assert 4 * smaller <= 3 * larger
        assert larger == 2 * smaller or (larger == capacity and 3 * larger < 8 * smaller)


@pytest.mark.parametrize(
    ("capacity", "windows"), [(1536, [1536]), (1537, [512, 1537]), (4096, [512, 1024, 4096]), (64, [64])]
)
def test_windows(capacity: int, windows: list[int]) -> None:
    assert decode_windows(capacity) == windows


@pytest.mark.parametrize(
    ("length", "tokens"), [(1, 1536), (512, 1536), (513, 3072), (1024, 3072), (1025, 4096), (4096, 4096)]
)
def test_a_window_is_copied(length: int, tokens: int) -> None:
    assert moved_tokens(length, 4096) == tokens


def test_a_window_of_an_int8_cache_is_not_copied() -> None:
    """So each half of a larger window is one, too, but for one of nearly the whole context."""
    assert decode_windows(4096, has_per_token_scales=True) == [512, 1024, 2048, 4096]
    assert decode_windows(512, has_per_token_scales=True) == [512]
    assert decode_windows(1100, has_per_token_scales=True) == [512, 1100]
    assert decode_windows(1365, has_per_token_scales=True) == [512, 1365]
    assert decode_windows(1366, has_per_token_scales=True) == [512, 1024, 1366]
    assert [moved_tokens(length, 4096, has_per_token_scales=True) for length in (1, 512, 513, 4096)] == [
        512,
        512,
        1024,
        4096,
    ]


def test_an_int8_cache_has_half_of_the_bytes_and_scales(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale of two bytes for each token, layer and head of keys and of values: on the bus, and in memory."""
    command = str(tiny_checkpoint), "--target=tensorrt", "--fp16", "--max-context=256"
    language = TINY.language
    saved = language.cache_values - 4 * language.layers * language.kv_heads
    reports = []
    for cache in ("float", "int8"):
        assert cli.main([*command, f"--kv-cache={cache}", "--dry-run", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    plain, int8 = reports
    step = "decode step, up to 256 tokens"
    assert plain["traffic"][step]["fused"] - int8["traffic"][step]["fused"] == 256 * saved
    assert plain["key_value_cache"] - int8["key_value_cache"] == 256 * saved
    assert int8["scene_prefix"] / plain["scene_prefix"] == int8["key_value_cache"] / plain["key_value_cache"]
    # Keys and values of a layer, dequantized: of a whole context, and of a prefix of 80 + 16 tokens.
    prompt = 4 * language.kv_heads * language.head_dim * (256 + 80 + 16)
    assert int8["activations"] - plain["activations"] == prompt


def traffic(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, dict[str, int]]:
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    found: dict[str, dict[str, int]] = json.loads(capsys.readouterr().out)["traffic"]
    return found


def test_traffic_of_a_bundle(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In float16 a step reads two bytes a weight, and the keys and values of every token of the cache."""
    command = str(tiny_checkpoint), "--target=tensorrt", "--fp16", "--max-context=256"
    runs = traffic(capsys, *command)
    language = TINY.language
    width, mlp = language.hidden_size, language.mlp_width
    attention = (language.heads + 2 * language.kv_heads) * language.head_dim * width + width * width
    weights = language.layers * (attention + 3 * width * mlp) + language.vocab_size * width
    step = 2 * weights + 2 * 256 * language.cache_values
    assert runs["decode step, up to 256 tokens"] == {"fused": step, "unfused": step}
    assert len(runs) == 2
    assert runs["vision encoder, weights"]["fused"] == runs["vision encoder, weights"]["unfused"] > 0
    head = language.vocab_size * width
    changed = traffic(capsys, *command, INT8[0])["decode step, up to 256 tokens"]
    assert changed["fused"] == step - 2 * head + head + 2 * language.vocab_size
    assert changed["unfused"] - changed["fused"] == DEQUANTIZED_TRAFFIC * head


@pytest.mark.parametrize(
    ("target", "precision", "vision"),
    [
        *product(("tensorrt",), ("int8", "int4"), ("int8-weights", "float")),
        *product(("cpu",), ("int8", "int4", "uint4", "nf4"), ("int8-weights", "float")),
        *product(("tensorrt", "cpu"), ("fp16", "fp32"), (None,)),
    ],
)
def test_weights_have_the_bytes_of_the_bundle(target: str, precision: str, vision: str | None) -> None:
    """The count from a manifest, and from a plan, is that of the data files. Rows of ``down`` have several blocks."""
    options = ExportOptions(target=target, precision=precision, vision=vision)
    with Checkpoint(DEMO_CHECKPOINT) as checkpoint:
        plan = plan_export(checkpoint, options)
    stored: Counter[str] = Counter()
    for file in plan.data_files:
        for tensor in file.tensors:
            linear = plan.linear_by_weight.get(tensor.parameter)
            if linear is not None and not linear.is_table:
                stored[linear.name.partition(".")[0]] += tensor.nbytes
    smallest = min(decode_windows(plan.options.max_context))
    cached = plan.config.language.cache_values * np.dtype(plan.options.cache).itemsize
    step = decode_steps(plan)[smallest].fused - cached * moved_tokens(smallest, plan.options.max_context)
    assert step == weight_bytes(plan.manifest(())) == stored["llm"]
    assert vision_run(plan).fused == stored["vision"]


def test_nvfp4_has_four_and_a_half_bits() -> None:
    """The two scales of whole tensors are not counted. Memory is the bundle's: scales stay in FP8."""
    options = ExportOptions(target="tensorrt", precision="fp16", is_calibrated=True)
    with Checkpoint(DEMO_CHECKPOINT) as checkpoint:
        plain = plan_export(checkpoint, options)
        rules = (Rule("llm.layers.*", WeightFormat.parse("nvfp4")),)
        plan = plan_export(checkpoint, dataclasses.replace(options, rules=rules))
    linears = [linear for linear in plan.linears.values() if linear.format.kind == "nvfp4"]
    saved = sum(linear.size for linear in linears) * (16 - 4.5) / 8
    for before, after in zip(decode_steps(plain).values(), decode_steps(plan).values(), strict=True):
        assert before.fused - after.fused == saved
        assert after.unfused == after.fused
    less = estimate(plain).weights - estimate(plan).weights
    assert saved - 8 * len(linears) <= less <= saved


def test_dry_run_tells_both_cases(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tiny_checkpoint), "--dry-run", "--max-context=256", "--fp16"]
    assert cli.main([*command, "--target=jetson-orin"]) == 0
    text = capsys.readouterr().out
    assert "decode step, up to 256 tokens" in text
    assert " ms\n" in text
    assert "dequantized" not in text
    assert cli.main([*command, "--target=tensorrt", INT8[0]]) == 0
    text = capsys.readouterr().out
    assert text.count("if 8-bit weights are dequantized first") == 1
    assert " ms\n" not in text
    assert cli.main([*command, "--target=cpu"]) == 0
    assert "Moved" not in capsys.readouterr().out
