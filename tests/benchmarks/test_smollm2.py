"""The SmolLM2 benchmark: a bundle matches its GGUF file, and perplexity is correct."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.opset24 import needs_opset_24
from tokenizers import Tokenizer, pre_tokenizers

from fusion_edge.benchmarks.accuracy.perplexity import ROWS_AT_ONCE, TextModel, negative_log_likelihood, perplexity
from fusion_edge.benchmarks.accuracy.smollm2 import table, windows
from fusion_edge.benchmarks.accuracy.smollm2_checkpoint import CONTROL, MARKERS, RENAMED, Gguf, write_checkpoint
from fusion_edge.export import cli

Doubles = npt.NDArray[np.float64]

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, MLP, THETA = 2, 32, 2, 1, 16, 48, 1000.0


@pytest.fixture(scope="module")
def gguf() -> Gguf:
    """Return a tiny model as llama.cpp stores it."""
    tokens = [*RENAMED, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    generator = np.random.default_rng(0)

    def random(*shape: int, mean: float = 0.0) -> npt.NDArray[np.float32]:
        return generator.normal(mean, 0.3, shape).astype(np.float32)

    tensors = {"token_embd": random(len(tokens), HIDDEN), "output_norm": random(HIDDEN, mean=1)}
    for i in range(LAYERS):
        tensors |= {
            f"blk.{i}.attn_norm": random(HIDDEN, mean=1),
            f"blk.{i}.attn_q": random(HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_k": random(KV_HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_v": random(KV_HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_output": random(HIDDEN, HEADS * DIM),
            f"blk.{i}.ffn_norm": random(HIDDEN, mean=1),
            f"blk.{i}.ffn_gate": random(MLP, HIDDEN),
            f"blk.{i}.ffn_up": random(MLP, HIDDEN),
            f"blk.{i}.ffn_down": random(HIDDEN, MLP),
        }
    fields = {
        "llama.embedding_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": MLP,
        "llama.vocab_size": len(tokens),
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": THETA,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.token_type": [CONTROL] * len(RENAMED) + [1] * (len(tokens) - len(RENAMED)),
    }
    return Gguf(fields, tensors, dict.fromkeys(tensors, "F32"))


def llama(tensors: dict[str, Doubles], tokens: npt.NDArray[np.int64]) -> Doubles:
    """Compute logits ``[L,V]`` as llama.cpp does, rotating neighboring rows."""

    def norm(x: Doubles, weight: Doubles) -> Doubles:
        normed: Doubles = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
        return normed

    def rotated(x: Doubles) -> Doubles:
        pairs = x.reshape(len(x), -1, DIM // 2, 2)
        angles = np.outer(np.arange(len(x)), THETA ** (-2 * np.arange(DIM // 2) / DIM))
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(len(x), -1, DIM)

    x = tensors["token_embd"][tokens]
    future = np.triu(np.ones((len(x), len(x)), bool), 1)
    for i in range(LAYERS):
        w = {name.split(".")[2]: value for name, value in tensors.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, w["attn_norm"])
        q, k = rotated(h @ w["attn_q"].T), rotated(h @ w["attn_k"].T)
        v = (h @ w["attn_v"].T).reshape(len(x), KV_HEADS, DIM)
        k, v = (part.repeat(HEADS // KV_HEADS, 1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(DIM)
        scores[:, future] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", shares, v).reshape(len(x), -1) @ w["attn_output"].T
        h = norm(x, w["ffn_norm"])
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    logits: Doubles = norm(x, tensors["output_norm"]) @ tensors["token_embd"].T
    return logits


def test_bundle_matches_the_gguf_file(gguf: Gguf, tmp_path: Path) -> None:
    expected_tensors = {name: value.astype(np.float64) for name, value in gguf.tensors.items()}
    write_checkpoint(gguf, tmp_path / "checkpoint")
    tokenizer = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json"))
    (tokens,) = windows(tokenizer, ["What is that? the thing\n"], 12, 1)
    assert "th" in tokenizer.encode("the").tokens
    assert tokenizer.encode(MARKERS[0]).ids == [list(RENAMED.values()).index(MARKERS[0])]
    bundle = tmp_path / "bundle"
    assert cli.main([str(tmp_path / "checkpoint"), "-o", str(bundle), "--fp32", "--image-tokens", "1"]) == 0
    actual = TextModel(bundle, threads=1, accuracy_level=0).logits(tokens)
    expected = llama(expected_tensors, tokens)
    assert np.abs(actual - expected).max() < 1e-4 * expected.std()


def test_likelihood_of_each_following_token() -> None:
    generator = np.random.default_rng(1)
    length, vocabulary = ROWS_AT_ONCE + 3, 7
    logits = generator.normal(0, 3, (length, vocabulary)).astype(np.float32)
    tokens = generator.integers(0, vocabulary, length)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    expected = -sum(math.log(p[i, tokens[i + 1]]) for i in range(length - 1))
    assert negative_log_likelihood(logits, tokens) == pytest.approx(expected, rel=1e-9)
    uniform = negative_log_likelihood(np.full_like(logits, 50), tokens)
    assert uniform == pytest.approx((length - 1) * math.log(vocabulary))


def test_perplexity_covers_the_windows_after_the_prompt(gguf: Gguf, tmp_path: Path) -> None:
    write_checkpoint(gguf, tmp_path / "checkpoint")
    bundle = tmp_path / "bundle"
    assert cli.main([str(tmp_path / "checkpoint"), "-o", str(bundle), "--fp32", "--image-tokens", "1"]) == 0
    model, prompt = TextModel(bundle, threads=1, accuracy_level=0), np.array([5, 9, 17])
    windows = [np.array([40, 41, 42, 43]), np.array([60, 12, 60, 90])]
    losses = []
    for window in windows:
        for i in range(len(window)):
            logits = model.logits(np.concatenate([prompt, window[:i]]))[-1].astype(np.float64)
            losses.append(np.log(np.exp(logits).sum()) - logits[window[i]])
    assert perplexity(model, prompt, windows) == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


@needs_opset_24
def test_graphs_for_tensorrt(gguf: Gguf, tmp_path: Path) -> None:
    """In float16 they give the logits of the float32 graph."""
    write_checkpoint(gguf, tmp_path / "checkpoint")
    tokens, logits = np.array([5, 9, 17, 40, 41, 42]), []
    for options in (["--fp32"], ["--fp16", "--target=tensorrt"]):
        bundle = tmp_path / options[0]
        assert cli.main([str(tmp_path / "checkpoint"), "-o", str(bundle), "--image-tokens=1", *options]) == 0
        logits.append(TextModel(bundle, threads=1, accuracy_level=0).logits(tokens))
    assert np.abs(logits[1] - logits[0]).max() <= 0.02 * logits[0].std()


def test_table_shows_the_remaining_loss() -> None:
    row = {"group_size": 64, "accuracy_level": 4, "rtn": 24.0, "gptq": 17.0, "loss_left": 0.125}
    assert "| 64 | 4 | 24.00 | 17.00 | 12.5% |" in table({"float": 16.0, "quantized": [row]})


def test_table_of_formats() -> None:
    rows = [{"format": "fp8", "rtn": 16.125}, {"format": "nvfp4", "rtn": 19.5, "gptq": 17.25}]
    printed = table({"float": 16.0, "quantized": rows})
    assert "| fp8 | 16.125 |  |" in printed
    assert "| nvfp4 | 19.500 | 17.250 |" in printed
