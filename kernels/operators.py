"""Signatures of the operators that the CPU kernels implement (``kernels/cpu/``): names, types, attributes.

Python code uses this table. The C++ code declares the signatures again, because ONNX Runtime reads them from the
library; ``tests/kernels/test_operators.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DOMAIN = "fusion_edge"
"""Domain of our operators. A graph also defines each as an ONNX function (``kernels/onnx_functions/``)."""
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's contributed operators, some of which the kernels replace."""

AttributeType = Literal["int", "float", "string"]


@dataclass(frozen=True)
class Operator:
    """Signature of one operator."""

    domain: str
    name: str
    inputs: Mapping[str, str]
    """Element type (numpy name) by input, in order."""
    outputs: Mapping[str, str]
    """Element type (numpy name) by output, in order."""
    attributes: Mapping[str, AttributeType] = field(default_factory=dict)
    required: int | None = None
    """Number of required inputs, which come first. None: all are required."""

    def positions(self, *inputs: str) -> tuple[int, ...]:
        """Return the positions of the named inputs. Raises ``ValueError`` for an unknown name."""
        return tuple(list(self.inputs).index(name) for name in inputs)


# Linear layers -------------------------------------------------------------------------------------------------------

_MATMUL_NBITS_ATTRIBUTES: Mapping[str, AttributeType] = {
    "K": "int",
    "N": "int",
    "bits": "int",
    "block_size": "int",
    "accuracy_level": "int",
}


def _matmul_nbits(domain: str, name: str, scales: str) -> Operator:
    inputs = {
        "x": "float32",
        "values": "uint8",
        "scales": scales,
        "zero_points": "uint8",
        "group_indices": "int32",
        "bias": "float32",
    }
    return Operator(domain, name, inputs, {"output": "float32"}, _MATMUL_NBITS_ATTRIBUTES, required=3)


CONTRIBUTED_MATMUL_NBITS = _matmul_nbits(MICROSOFT, "MatMulNBits", "float32")
MATMUL_NBITS = _matmul_nbits(DOMAIN, "MatMulNBits", "float16")
GELU_MATMUL_NBITS = _matmul_nbits(DOMAIN, "GeluMatMulNBits", "float16")

INTEGER_LINEAR_INPUTS: Mapping[str, str] = {
    "values": "int8",
    "scales": "float16",
    "x_scale": "float32",
    "x_zero_point": "uint8",
    "bias": "float32",
}
"""Inputs of an 8-bit linear layer after x: weights ``[N,K]`` and their scales ``[N]``, scale ``[]`` and zero point
``[]`` of x, bias ``[N]``."""

INTEGER_MATMUL = Operator(DOMAIN, "IntegerProduct", {"x": "float32", **INTEGER_LINEAR_INPUTS}, {"output": "float32"})
GELU_INTEGER_MATMUL = Operator(DOMAIN, "GeluIntegerProduct", INTEGER_MATMUL.inputs, INTEGER_MATMUL.outputs)
INTEGER_MLP = Operator(
    DOMAIN,
    "IntegerMlp",
    {
        "x": "float32",
        **{f"up_{name}": dtype for name, dtype in INTEGER_LINEAR_INPUTS.items()},
        **{f"down_{name}": dtype for name, dtype in INTEGER_LINEAR_INPUTS.items()},
    },
    {"output": "float32"},
)

# Activation functions ------------------------------------------------------------------------------------------------

QUICK_GELU = Operator(MICROSOFT, "QuickGelu", {"x": "float32"}, {"output": "float32"}, {"alpha": "float"})
FAST_GELU = Operator(MICROSOFT, "FastGelu", {"x": "float32", "bias": "float32"}, {"output": "float32"}, required=1)
SWIGLU = Operator(DOMAIN, "SwiGlu", {"gate": "float32", "up": "float32"}, {"output": "float32"})

# Attention -----------------------------------------------------------------------------------------------------------

MULTI_HEAD_ATTENTION = Operator(
    MICROSOFT,
    "MultiHeadAttention",
    {
        "query": "float32",
        "key": "float32",
        "value": "float32",
        "bias": "float32",
        "key_padding_mask": "int32",
        "attention_bias": "float32",
        "past_key": "float32",
        "past_value": "float32",
    },
    {"output": "float32"},
    {"num_heads": "int", "mask_filter_value": "float", "scale": "float", "unidirectional": "int"},
    required=3,
)

PACKED_ATTENTION = Operator(
    DOMAIN,
    "PackedAttention",
    {"qkv": "float32", "key_mask": "int32"},
    {"output": "float32"},
    {"num_heads": "int", "mask_filter_value": "float"},
)
PATCH_ATTENTION = Operator(
    DOMAIN,
    "PatchAttention",
    PACKED_ATTENTION.inputs,
    PACKED_ATTENTION.outputs,
    {**PACKED_ATTENTION.attributes, "patches": "int"},
)


def _group_query_attention(cache: str) -> Operator:
    inputs = {
        "query": "float32",
        "key": "float32",
        "value": "float32",
        "past_key": cache,
        "past_value": cache,
        "seqlens_k": "int32",
        "total_sequence_length": "int32",
        "cos_cache": "float32",
        "sin_cache": "float32",
        "position_ids": "int64",
        "attention_bias": "float32",
        "head_sink": "float32",
        "k_scale": "float32",
        "v_scale": "float32",
    }
    attributes: dict[str, AttributeType] = {
        "num_heads": "int",
        "kv_num_heads": "int",
        "scale": "float",
        "do_rotary": "int",
        "rotary_interleaved": "int",
        "local_window_size": "int",
        "softcap": "float",
        "smooth_softmax": "int",
        "qk_output": "int",
        "k_quant_type": "string",
        "v_quant_type": "string",
    }
    if cache == "int8":
        attributes["kv_cache_bit_width"] = "int"
    outputs = {"output": "float32", "present_key": cache, "present_value": cache}
    return Operator(MICROSOFT, "GroupQueryAttention", inputs, outputs, attributes, required=1)


GROUP_QUERY_ATTENTION = _group_query_attention("float32")
INT8_GROUP_QUERY_ATTENTION = _group_query_attention("int8")

CACHED_ATTENTION = Operator(
    DOMAIN,
    "CachedAttention",
    {
        "qkv": "float32",
        "past.key": "int8",
        "past.value": "int8",
        "past.key_scale": "float32",
        "past.value_scale": "float32",
        "last_position": "int32",
        "total_length": "int32",
        "cos": "float32",
        "sin": "float32",
        "is_prefill": "bool",
    },
    {
        "attended": "float32",
        "present.key": "int8",
        "present.value": "int8",
        "present.key_scale": "float32",
        "present.value_scale": "float32",
    },
    {
        "num_heads": "int",
        "kv_num_heads": "int",
        "scale": "float",
        "scale_factor": "float",
        "smallest_scale": "float",
    },
)

CPU_OPERATORS = (
    MULTI_HEAD_ATTENTION,
    GROUP_QUERY_ATTENTION,
    INT8_GROUP_QUERY_ATTENTION,
    CONTRIBUTED_MATMUL_NBITS,
    QUICK_GELU,
    FAST_GELU,
    CACHED_ATTENTION,
    PACKED_ATTENTION,
    PATCH_ATTENTION,
    MATMUL_NBITS,
    GELU_MATMUL_NBITS,
    INTEGER_MATMUL,
    GELU_INTEGER_MATMUL,
    INTEGER_MLP,
    SWIGLU,
)
"""All operators of the library. GroupQueryAttention is there once for each type of cache."""
