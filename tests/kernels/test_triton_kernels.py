"""Triton kernels in Triton's interpreter against PyTorch, and their ahead-of-time compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_edge.benchmarks import alignment_kernels
from fusion_edge.benchmarks.alignment_kernels import RUNS, inputs, largest_error
from fusion_edge.kernels.triton import ahead_of_time
from fusion_edge.kernels.triton import recursive_alignment as kernels
from fusion_edge.kernels.triton.ahead_of_time import ARCHITECTURES
from fusion_edge.kernels.triton.kernel_folder import CompiledKernel, KernelFolder
from fusion_edge.runtime.errors import FusionError

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""One rounding to the type, for values of about 1. float32: sums in another order."""
DTYPES = list(TOLERANCE)


def values(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "context"), [(16, 12, 9), (2, 192, 9), (1, 256, 9), (3, 5, 4), (1, 1, 1)])
@pytest.mark.parametrize(("questions", "latents"), [(1, 4), (3, 5), (1, 0), (0, 4)])
def test_context_attention(
    dtype: torch.dtype, heads: int, dim: int, context: int, questions: int, latents: int
) -> None:
    q = values(questions, latents, heads * dim, dtype=dtype)
    k, v = values(2, 1, latents, context, heads * dim, dtype=dtype)
    expected = kernels.context_attention_reference(q, k, v, heads)
    actual = kernels.context_attention(q, k, v, heads)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_scores_far_apart() -> None:
    q, k, v = (100 * values(*shape, dtype=torch.float32) for shape in ((1, 2, 64), (1, 2, 9, 64), (1, 2, 9, 64)))
    actual = kernels.context_attention(q, k, v, 2)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, kernels.context_attention_reference(q, k, v, 2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 3072, 4096])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_add_layer_norm(dtype: torch.dtype, width: int, rows: int) -> None:
    x, residual = values(2, 1, rows, width, dtype=dtype)
    weight, bias = values(2, width, dtype=dtype)
    expected = kernels.add_layer_norm_reference(x, residual, weight, bias, 1e-5)
    actual = kernels.add_layer_norm(x, residual, weight, bias, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("questions", "latents", "width"), [(1, 4, 64), (2, 9, 100), (1, 0, 8), (1, 1, 3072)])
def test_add_rows(dtype: torch.dtype, questions: int, latents: int, width: int) -> None:
    x = values(40, width, dtype=dtype)
    positions = torch.randperm(40)[: questions * latents].reshape(questions, latents)
    old, update = values(2, questions, latents, width, dtype=dtype)
    expected = x.clone()
    kernels.add_rows_reference(expected, positions, old, update)
    kernels.add_rows(x, positions, old, update)
    others = [row for row in range(40) if row not in positions.flatten()]
    assert torch.equal(x[others], expected[others])
    torch.testing.assert_close(x, expected, rtol=TOLERANCE[dtype], atol=0)


def test_rows_outside_of_the_data_do_not_change() -> None:
    """Blocks after the last row do nothing, and positions outside of the sequence are skipped."""
    x, q, update = (values(1, 3, 8, dtype=torch.float32) for _ in range(3))
    k, v = values(2, 1, 3, 9, 8, dtype=torch.float32)
    weight = torch.ones(8)
    outputs = [torch.full((3, 8), 7.0) for _ in range(4)]
    kernels.context_attention_kernel[3, 1](q, k, v, 2, 3, outputs[0], 9, 8, 16, 8)
    kernels.add_layer_norm_kernel[(3,)](x, q, weight, weight, 2, outputs[1], 1e-5, 8, 8)
    kernels.add_rows_kernel[(3,)](x, torch.tensor([[0, 1, 2]]), q, update, 2, 3, outputs[2], 8, 8)
    kernels.add_rows_kernel[(3,)](x, torch.tensor([[0, 1, 2]]), q, update, 3, 2, outputs[3], 8, 8)
    for output in outputs:
        assert (output[:2] != 7).all()
        assert (output[2] == 7).all()
    untouched = torch.full((3, 8), 7.0)
    kernels.add_rows_kernel[(3,)](x, torch.tensor([[-1, 3, 2**40]]), q, update, 3, 3, untouched, 8, 8)
    assert (untouched == 7).all()


def test_ahead_of_time(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "fusion_edge.kernels.triton.ahead_of_time",
        "--output",
        str(tmp_path),
        "--width",
        "3072",
    ]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert {(row["entry"]["architecture"], row["entry"]["kernel"]) for row in built} == {
        (architecture, kernel)
        for architecture in ARCHITECTURES
        for kernel in ("context_attention", "add_layer_norm", "add_rows")
    }
    for row in built:
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] <= 255
        entry = row["entry"]
        text = (tmp_path / entry["file"]).read_text()
        assert f".target sm_{entry['architecture']}" in text
        assert f".entry {entry['name']}(" in text
        assert "debug" not in text
        assert ".py" not in text
        major, minor = ARCHITECTURES[entry["architecture"]]
        assert f".version {major}.{minor}\n" in text
    read_back(tmp_path, built[0]["entry"])


def read_back(folder: Path, entry: dict[str, Any]) -> None:
    """Read a kernel back; missing and changed ones are errors."""
    source = KernelFolder(folder)
    wanted = entry["kernel"], entry["architecture"], entry["width"], entry["dtype"]
    path = folder / entry["file"]
    assert source(*wanted) == CompiledKernel(entry["name"], path.read_text(), entry["threads"], entry["shared_bytes"])
    with pytest.raises(FusionError, match=r"has no .* width 4096 and fp16; make it with: python -m .* --width 4096"):
        source(entry["kernel"], entry["architecture"], 4096, entry["dtype"])
    path.write_text(path.read_text() + " ")
    with pytest.raises(FusionError, match="missing or has changed; make it with"):
        source(*wanted)
    path.unlink()
    with pytest.raises(FusionError, match="missing or has changed"):
        source(*wanted)


@pytest.mark.parametrize("content", [None, "[]", '{"entries": [{}]}', "{"])
def test_folder_without_kernels(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "kernels.json").write_text(content)
    with pytest.raises(FusionError, match=r"is not a folder of kernels .*; make it with"):
        KernelFolder(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_benchmark_compares_with_float64(name: str, dtype: torch.dtype) -> None:
    one = inputs((2, 4, 64), dtype, "cpu", 0)
    assert largest_error(name, one) <= TOLERANCE[dtype]
    assert kernels.bytes_moved(2, 4, 64, 9, dtype.itemsize)[name] == bytes_of(one, name)


def bytes_of(one: dict[str, torch.Tensor], name: str) -> int:
    """Return the bytes read and written. Every result has the size of ``q``."""
    read = {
        "context_attention": ("q", "k", "v"),
        "add_layer_norm": ("q", "residual", "weight", "bias"),
        "add_rows": ("q", "residual", "positions"),
    }[name]
    return sum(one[key].nbytes for key in (*read, "q"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_without_a_gpu(refused: Callable[..., str]) -> None:
    assert "There is no GPU" in refused(alignment_kernels.main)


def test_width_must_be_divisible_by_heads(tmp_path: Path, refused: Callable[..., str]) -> None:
    message = refused(ahead_of_time.main, "--output", tmp_path / "ptx", "--width", "100", code=2)
    assert "--width 100 cannot be split into 16 heads" in message
    assert not list(tmp_path.iterdir())
