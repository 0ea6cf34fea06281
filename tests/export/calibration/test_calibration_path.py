"""Blocks and observers: the whole model, block by block, and the Hessian of every linear's inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.logits import first_logits
from support.paths import GOLDEN
from torch import Tensor

from fusion_edge.export.calibration.activation_cache import Activations
from fusion_edge.export.calibration.blocks import blocks, prepare
from fusion_edge.export.calibration.observer import ATTENTION_WEIGHT, Observer, attention_received
from fusion_edge.export.checkpoint.tensor_mapping import parameters
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.samples import Sample


@pytest.mark.parametrize("name", ["FUSION-tiny-Phi", "FUSION-X-tiny-LLaMA"])
def test_blocks_compute_the_model(name: str) -> None:
    """The blocks in sequence compute the logits of the whole model, and read every linear once."""
    sample = Sample(GOLDEN / "phi_one_turn.png", "What is in the picture?")
    with open_checkpoint(GOLDEN / name) as fusion:
        expected = first_logits(fusion, sample.image, sample.question)
        backend = fusion.backend
        assert isinstance(backend, EagerBackend)
        length = fusion.manifest.query_lengths[0]
        prepared = prepare(sample, fusion.tokenizer, fusion.config, length, fusion.manifest.image_side, "cpu")
        formats = {
            parameter.removesuffix(".weight"): WeightFormat("int4", 32)
            for parameter, facts in parameters(fusion.config).items()
            if facts.kind == "linear"
        }
        seen: list[str] = []
        state: Activations = {}
        for block in blocks(fusion.config):
            read: list[str] = []

            def get(parameter: str, read: list[str] = read) -> Tensor:
                read.append(parameter)
                return backend.parameter(parameter)

            def embed(ids: Tensor) -> Tensor:
                return torch.from_numpy(backend.embed(ids.numpy()))

            operations = Observer(fusion.config, get, embed, "cpu", formats)
            with torch.inference_mode():
                state = block.run(operations, prepared, state)
            others = [parameter for parameter in read if not parameter.startswith(block.prefixes)]
            assert set(others) <= {"vision.position_embedding.weight", "llm.norm.weight"}
            seen += operations.hessian_index
    assert sorted(seen) == sorted(formats)
    actual = state["logits"].numpy()
    assert actual.shape == (1, len(expected))
    assert np.abs(actual[0] - expected).max() <= 1e-5 * expected.std()


def test_hessians_do_not_depend_on_batches() -> None:
    rows = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))

    def observe(batches: Iterator[Tensor]) -> Tensor:
        weights = torch.zeros(4, 32)
        operations = Observer(None, lambda _: weights, None, "cpu", {"a": WeightFormat("int4", 32)})  # type: ignore[arg-type]
        for batch in batches:
            operations.linear(batch, "a")
        return operations.hessians[0]

    expected = rows.reshape(-1, 32).double().T @ rows.reshape(-1, 32).double()
    for size in (1, 2, 3):
        torch.testing.assert_close(observe(iter(torch.split(rows, size))), expected, rtol=1e-6, atol=1e-5)


def test_linears_that_share_an_input_share_a_hessian() -> None:
    x, weights = torch.randn(5, 32), torch.zeros(4, 32)
    formats = dict.fromkeys(("a", "b", "c"), WeightFormat("int4", 32))
    operations = Observer(None, lambda _: weights, None, "cpu", formats)  # type: ignore[arg-type]
    for _ in range(2):
        operations.linear(x, "a")
        operations.linear(x, "b")
        operations.linear(x * 2, "c")
    assert operations.hessian_index == {"a": 0, "b": 0, "c": 1}
    torch.testing.assert_close(operations.hessians[1], 4 * operations.hessians[0])


def test_attention_received() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 6, 11, 8, generator=generator), torch.randn(1, 2, 11, 8, generator=generator)
    scores = torch.einsum("hid,hjd->hij", q[0], k[0].repeat_interleave(3, 0)).numpy() / np.sqrt(8)
    scores[:, np.arange(11)[:, None] < np.arange(11)] = -np.inf
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    received = attention_received(q, k)
    np.testing.assert_allclose(received[0].numpy(), shares.mean(0).sum(0), rtol=1e-5)
    assert received.sum().item() == pytest.approx(11)


def test_attention_rows_are_weighted_by_received_attention() -> None:
    name = "llm.layers.0.attention.qkv"
    generator = torch.Generator().manual_seed(1)
    with open_checkpoint(GOLDEN / "FUSION-tiny-Phi") as fusion:
        config, backend = fusion.config, fusion.backend
        assert isinstance(backend, EagerBackend)
        formats = {name: WeightFormat("int4", 32)}
        operations = Observer(config, backend.parameter, None, "cpu", formats)  # type: ignore[arg-type]
        rows = torch.randn(1, 7, config.language.hidden_size, generator=generator)
        qkv = operations.linear(rows, name)
        operations.causal_attention(qkv, 0)
    received = attention_received(*operations.heads(qkv, 0)[:2])[0].double()
    x = rows[0].double()
    expected = x.T @ ((1 + ATTENTION_WEIGHT * received[:, None]) * x)
    torch.testing.assert_close(operations.hessians[0], expected, rtol=1e-5, atol=1e-4)
    assert received[0] > 1.5 * received[-1]  # otherwise weighting changes nothing
