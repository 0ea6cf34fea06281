"""The table of operators against the built library, the ONNX functions, and the graphs' allowlist."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzz.fake_onnxruntime import FakeOnnxRuntime
from fuzz.kernel_calls import KINDS
from fuzz.kernel_cases import Case
from onnx import FunctionProto
from support.cpu_kernel_switches import needs_cpu_kernels

from fusion_edge.export.lowering import nvfp4
from fusion_edge.kernels.onnx_functions import activations, alignment, attention, int8_cache, linear
from fusion_edge.kernels.onnx_functions.masked_attention import MASKED_ATTENTION
from fusion_edge.kernels.operators import CPU_OPERATORS, DOMAIN, Operator
from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.bundle.graph_validation import OPERATORS

NOT_READ = {"accuracy_level"}
"""Attributes that the kernels ignore: they have one accuracy level."""
OPSET = 21
FUNCTIONS = (
    activations.swiglu_function(OPSET),
    attention.packed_attention_function(OPSET),
    attention.patch_attention_function(OPSET),
    int8_cache.attention_function(2, 16, OPSET),
    linear.integer_matmul_function(OPSET),
    linear.integer_matmul_function(OPSET, gelu=True),
    linear.integer_mlp_function(OPSET),
    linear.matmul_nbits_function(OPSET),
    linear.matmul_nbits_function(OPSET, gelu=True),
)


@pytest.fixture
def runtime(tmp_path: Path) -> FakeOnnxRuntime:
    """The fake with a copy of the library: the original may be registered with ONNX Runtime in this process."""
    library = cpu_kernels.library()
    assert library is not None
    return FakeOnnxRuntime(Path(shutil.copy(library, tmp_path)))


@needs_cpu_kernels
def test_the_library_registers_the_table(runtime: FakeOnnxRuntime) -> None:
    def signature(operator: Operator) -> tuple[str, str, list[type], list[type], int]:
        inputs, outputs = (
            [np.dtype(dtype).type for dtype in tensors.values()] for tensors in (operator.inputs, operator.outputs)
        )
        required = len(inputs) if operator.required is None else operator.required
        return operator.domain, operator.name, inputs, outputs, required

    registered = runtime.signatures()
    assert len(registered) == len(CPU_OPERATORS)
    for operator in CPU_OPERATORS:
        assert signature(operator) in registered


@needs_cpu_kernels
def test_the_library_reads_the_attributes_of_the_table(runtime: FakeOnnxRuntime) -> None:
    random, cases = np.random.default_rng(0), dict[str, Case]()
    keys = {_key(operator) for operator in CPU_OPERATORS}
    while cases.keys() != keys:
        case = KINDS[int(random.integers(len(KINDS)))](random)
        cases[_key(case.operator)] = case
    for case in cases.values():
        expected = {name: kind for name, kind in case.operator.attributes.items() if name not in NOT_READ}
        assert runtime.attributes_read(case.operator, case.attributes) == expected


def _key(operator: Operator) -> str:
    return f"{operator.domain}::{operator.name} {[*operator.outputs.values()]}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_a_function_has_the_signature_of_the_table(function: FunctionProto) -> None:
    (operator,) = (one for one in CPU_OPERATORS if (one.domain, one.name) == (function.domain, function.name))
    assert list(function.input) == list(operator.inputs)
    assert list(function.output) == list(operator.outputs)
    assert list(function.attribute) == list(operator.attributes)


def test_every_operator_of_ours_has_a_function() -> None:
    assert {function.name for function in FUNCTIONS} == {one.name for one in CPU_OPERATORS if one.domain == DOMAIN}


def test_graphs_may_hold_every_operator() -> None:
    for operator in CPU_OPERATORS:
        assert operator.name in OPERATORS[operator.domain]
    ours = {one.name for one in CPU_OPERATORS if one.domain == DOMAIN} | {plugin.operator for plugin in PLUGINS}
    ours |= {nvfp4.DEQUANTIZE, nvfp4.QUANTIZE, MASKED_ATTENTION}  # functions only
    assert {alignment.CONTEXT_ATTENTION, alignment.ADD_LAYER_NORM, alignment.ADD_ROWS} <= ours
    assert ours == OPERATORS[DOMAIN]
