"""Triton kernels of the recursive alignment (docs/fusion-model.md section 5): an interaction layer between its matmuls.

Three kernels, each one pass over its data; the engine runs the matmuls between them. All are bound by memory bandwidth:
:func:`bytes_moved` is their lower bound. Each has a reference in plain PyTorch. Arithmetic is float32, whatever the
storage type.

Parameters are in TensorRT's order (kernels/tensorrt_plugins.py): inputs, 32-bit integers, output. All other numbers are
constants. ``rows`` is the number of latents of all questions; each block of the grid handles one. CUDA rejects an empty
grid, so it has at least one block, which returns at once if there are no rows.
"""

# Triton's own types do not describe how kernels are launched.
# pyright: reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def context_attention_kernel(
    q,
    k,
    v,
    rows,
    latents,
    output,
    CONTEXT: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Attention of one head of one latent to its own ``CONTEXT`` keys and values, which it reads once.

    ``latents`` is the number of latents per question. ``WINDOW`` and ``COLUMNS`` are ``CONTEXT`` and ``DIM`` rounded up
    to powers of two.
    """
    row, head, width = tl.program_id(0), tl.program_id(1), tl.num_programs(1) * DIM
    if row >= rows:
        return
    column, context = tl.arange(0, COLUMNS), tl.arange(0, WINDOW)
    is_column, is_context = column < DIM, context < CONTEXT
    is_inside = is_context[:, None] & is_column[None, :]
    at = head * DIM + column
    window = ((row % latents) * CONTEXT + context)[:, None] * width + at[None, :]
    query = tl.load(q + row * width + at, mask=is_column, other=0.0).to(tl.float32)
    keys = tl.load(k + window, mask=is_inside, other=0.0).to(tl.float32)
    values = tl.load(v + window, mask=is_inside, other=0.0).to(tl.float32)
    scores = tl.where(is_context, tl.sum(query[None, :] * keys, axis=1) * DIM**-0.5, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0))
    attended = tl.sum(weights[:, None] * values, axis=0) / tl.sum(weights, axis=0)
    tl.store(output + row * width + at, attended.to(output.dtype.element_ty), mask=is_column)


@triton.jit
def add_layer_norm_kernel(
    x, residual, weight, bias, rows, output, EPS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """LayerNorm of one row of ``x + residual``, which it reads once."""
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    if row >= rows:
        return
    inside = column < WIDTH
    at = row * WIDTH + column
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / WIDTH
    centered = tl.where(inside, total - mean, 0.0)
    normed = centered / tl.sqrt(tl.sum(centered * centered, axis=0) / WIDTH + EPS)
    scaled = normed * tl.load(weight + column, mask=inside).to(tl.float32)
    scaled += tl.load(bias + column, mask=inside).to(tl.float32)
    tl.store(output + at, scaled.to(output.dtype.element_ty), mask=inside)


@triton.jit
def add_rows_kernel(x, positions, latents, update, rows, length, output, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Set row ``positions[i]`` of ``output`` to ``latents[i] + update[i]``. ``x`` shares its memory.

    Skips positions outside of the ``length`` rows: while TensorRT times the kernel, they may hold anything.
    """
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    if row >= rows:
        return
    inside = column < WIDTH
    at = row * WIDTH + column
    total = tl.load(latents + at, mask=inside).to(tl.float32) + tl.load(update + at, mask=inside).to(tl.float32)
    to = tl.load(positions + row)
    inside &= (to >= 0) & (to < length)
    tl.store(output + to * WIDTH + column, total.to(output.dtype.element_ty), mask=inside)


def context_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attend each latent to its own context: q ``[R,q,D]``, k and v ``[1,q,C,D]`` -> ``[R,q,D]``, contiguous."""
    questions, latents, width = q.shape
    context, dim = k.shape[2], width // heads
    rows, output = questions * latents, torch.empty_like(q)
    powers = triton.next_power_of_2(context), triton.next_power_of_2(dim)
    context_attention_kernel[max(rows, 1), heads](q, k, v, rows, latents, output, context, dim, *powers)
    return output


def context_attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Compute the same in plain PyTorch."""
    dim = q.shape[-1] // heads
    query, keys, values = (x.float().reshape(*x.shape[:-1], heads, dim) for x in (q, k, v))
    weights = ((query.unsqueeze(2) * keys).sum(-1) * dim**-0.5).softmax(2)
    attended: Tensor = (weights.unsqueeze(-1) * values).sum(2)
    return attended.flatten(-2).to(q.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute LayerNorm(x + residual): ``[...,D]``, ``[...,D]``, ``[D]``, ``[D]`` -> ``[...,D]``, contiguous."""
    width, output = x.shape[-1], torch.empty_like(x)
    rows, columns = x.numel() // width, triton.next_power_of_2(width)
    add_layer_norm_kernel[(max(rows, 1),)](x, residual, weight, bias, rows, output, eps, width, columns)
    return output


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the same in plain PyTorch."""
    total = x.float() + residual.float()
    return F.layer_norm(total, total.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def add_rows(x: Tensor, positions: Tensor, latents: Tensor, update: Tensor) -> None:
    """Write ``latents + update`` ``[R,q,D]`` to the rows ``positions`` ``[R,q]`` int64 of ``x`` ``[L,D]``, in place."""
    rows, (length, width) = positions.numel(), x.shape
    columns = triton.next_power_of_2(width)
    add_rows_kernel[(max(rows, 1),)](x, positions, latents, update, rows, length, x, width, columns)


def add_rows_reference(x: Tensor, positions: Tensor, latents: Tensor, update: Tensor) -> None:
    """Compute the same in plain PyTorch."""
    rows = (latents.float() + update.float()).to(x.dtype)
    x[positions.flatten()] = rows.reshape(-1, x.shape[-1])


def bytes_moved(questions: int, latents: int, width: int, context: int, size: int) -> dict[str, int]:
    """Return the bytes that each kernel must read and write, by name; ``size`` is the bytes of an element."""
    rows = questions * latents * width * size
    return {
        "context_attention": 2 * rows + 2 * latents * context * width * size,
        "add_layer_norm": 3 * rows + 2 * width * size,
        "add_rows": 3 * rows + 8 * questions * latents,
    }
