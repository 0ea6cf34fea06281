"""The pass that fuses a residual sum with the RMSNorm that reads it."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest

from fusion_edge.export.lowering.graph_builder import GraphBuilder
from fusion_edge.export.lowering.residual_norm import NORM, fuse_residual_norms
from fusion_edge.runtime.bundle.graphs import GraphSpec, TensorSpec

SHAPE = (1, 3, 8)
FUSED = f"Skip{NORM}"


def norm(builder: GraphBuilder, x: str, name: str) -> str:
    weight = builder.constant(np.linspace(0.5, 1.5, SHAPE[-1]), "float32")
    return builder.node(NORM, [x, weight], name, axis=-1, epsilon=1e-5, stash_type=1)[0]


def built() -> GraphBuilder:
    """``x = x + f(norm(x))`` twice, and a norm at the end: two norms read sums, the first reads the input."""
    spec = GraphSpec("g", (TensorSpec("x", "float32", SHAPE),), (TensorSpec("y", "float32", SHAPE),))
    builder = GraphBuilder(spec, 21)
    x = "x"
    for i in range(2):
        (update,) = builder.node("Sigmoid", [norm(builder, x, f"layers.{i}.norm")])
        (x,) = builder.node("Add", [x, update])
    builder.node("Identity", [norm(builder, x, "norm")], outputs=["y"])
    return builder


def test_sums_and_norms_become_one_node() -> None:
    builder = built()
    fuse_residual_norms(builder)
    assert builder.is_topological()
    assert [node.op_type for node in builder.nodes] == [NORM, "Sigmoid", FUSED, "Sigmoid", FUSED, "Identity"]
    fused = [node for node in builder.nodes if node.op_type == FUSED]
    assert [list(node.output) for node in fused] == [["layers.1.norm", "", "", "Add"], ["norm", "", "", "Add.1"]]


def test_results_stay_the_same() -> None:
    plain = built()
    fused = copy.deepcopy(plain)
    fuse_residual_norms(fused)
    x = np.random.default_rng(0).normal(0, 1, SHAPE).astype(np.float32)
    results = []
    for builder in (plain, fused):
        model = builder.model("g.data", "0").SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": x})[0])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def test_sum_with_two_norms_is_rejected() -> None:
    builder = built()
    norm(builder, "Add", "another")
    with pytest.raises(AssertionError):
        fuse_residual_norms(builder)
