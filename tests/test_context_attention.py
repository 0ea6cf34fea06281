"""The recursive alignment's operator: its ONNX function on ONNX Runtime against the plain reference."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from fusion_edge.kernels.context_attention import (
    DOMAIN,
    NAME,
    context_attention_function,
    context_attention_reference,
)

OPSET = 21


def session(heads: int, dim: int) -> ort.InferenceSession:
    width = heads * dim
    context: list[int | str | None] = [1, "n", 9, width]
    shapes: dict[str, list[int | str | None]] = {"q": ["R", "n", width], "k": context, "v": context}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["R", "n", width])
    graph = helper.make_graph([helper.make_node(NAME, ["q", "k", "v"], ["y"], domain=DOMAIN)], "g", inputs, [output])
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[context_attention_function(heads, dim, "float32", OPSET)],
        ir_version=10,
    )
    return ort.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize(("heads", "dim"), [(16, 4), (16, 192), (2, 6), (1, 1)])
@pytest.mark.parametrize("questions", [0, 1, 3])
@pytest.mark.parametrize("latents", [0, 1, 16, 36])
def test_function_is_the_reference(heads: int, dim: int, questions: int, latents: int) -> None:
    generator = np.random.default_rng([heads, dim, questions, latents])
    width = heads * dim
    q = generator.normal(size=(questions, latents, width)).astype(np.float32)
    k, v = (generator.normal(size=(1, latents, 9, width)).astype(np.float32) for _ in range(2))
    (actual,) = session(heads, dim).run(None, {"q": q, "k": k, "v": v})
    expected = context_attention_reference(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), heads)
    np.testing.assert_allclose(actual, expected, atol=2e-6 * np.sqrt(width))
